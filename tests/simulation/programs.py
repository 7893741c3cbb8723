"""Puts the simulated machine under the real programs, once per interpreter."""

import asyncio
import gc
import logging
import sys
from datetime import datetime
from functools import lru_cache
from io import FileIO
from types import FunctionType, SimpleNamespace
from typing import Any

from flplatform.client import executors, sandbox, session, site_run, spool
from flplatform.core import events
from flplatform.core import model as core_model
from flplatform.core.errors import DataLossError, ResourceExhaustedError
from flplatform.files import digest, durable, modelfile, modelwriter, removal, shortage, writing
from flplatform.rpc import channel, transfers
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security import package, signing
from flplatform.server import aggregation
from flplatform.store import blobs, part_file
from tests.simulation import models, network, site
from tests.simulation.system import (
    OpenFile,
    SimDatetime,
    SimMmap,
    SimOs,
    SimPath,
    SimSecrets,
    SimShutil,
    disks,
)

_NETWORK: list[network.Network] = []
_INSTALLED: list[bool] = []


def _digest_of_file(path: SimPath) -> tuple[str, int]:
    data = path.read_bytes()
    return models.ref(data).digest, len(data)


def _demand_digest(path: SimPath, expected: str) -> None:
    if _digest_of_file(path)[0] != expected:
        raise DataLossError(f"{path} is damaged")


def _demand_room(folder: SimPath, count: int) -> None:
    if SimShutil.disk_usage(folder).free < count:
        raise ResourceExhaustedError("the disk is full")


def _clear(_run: site_run.SiteRun, work: SimPath) -> int:
    """Remove what a try before has left; the simulated process keeps nothing in a box."""
    SimShutil.rmtree(work, ignore_errors=True)
    return 0


def _remove(path: SimPath) -> None:
    if path.is_dir():
        SimShutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_aside(handle: int, _offset: int, _count: int) -> bool:
    return not disks().handles[handle][0].full


def _open_channel(_address: str, **_: Any) -> network.Channel:
    return network.connect(_NETWORK[-1])


def _remember() -> None:
    """Let pure functions that are asked the same again and again remember what they said."""
    known = {
        function: lru_cache(10_000)(function)
        for function in (core_model.parse_header, core_model.encode_header, events.decode)
    }
    for name, module in list(sys.modules.items()):
        if name.startswith(("flplatform.", "tests.simulation.")):
            for key, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in known:
                    setattr(module, key, known[value])


def install() -> None:
    """Replace what reaches out of the programs: os, files, processes, signatures, gRPC.

    A function is replaced wherever it was imported to.
    """
    if _INSTALLED:
        return
    _INSTALLED.append(True)
    logging.getLogger("flplatform").setLevel(logging.ERROR)
    logging.getLogger("flplatform").propagate = False
    replaced: dict[Any, Any] = {
        FileIO: OpenFile,
        digest.digest_of_file: _digest_of_file,
        digest.demand_digest: _demand_digest,
        removal.remove: _remove,
        sandbox.sweep_scratch: lambda *_: None,
        shortage.demand_room: _demand_room,
        writing.set_aside: _set_aside,
        writing.start_writing: lambda *_: None,
        transfers.send_blob: network.send_blob,
        transfers.fetch_blob: network.fetch_blob,
        channel.open_channel: _open_channel,
        package.open_package: site.open_package,
        signing.open_order: site.open_order,
        signing.Signed: site.Order,
        executors.RunProcess: site.JobProcess,
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith(("flplatform.client", "flplatform.server", "flplatform.store")):
            continue
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", "") != name and value.__hash__ and value in replaced:
                setattr(module, key, replaced[value])
        for key, put in (("shutil", SimShutil()), ("secrets", SimSecrets)):
            if key in vars(module):
                vars(module)[key] = put
        if vars(module).get("datetime") is datetime:
            vars(module)["datetime"] = SimDatetime

    def now() -> float:
        return disks().world.loop.now

    vars(durable).update(os=SimOs(), shutil=SimShutil(), secrets=SimSecrets)
    vars(modelfile).update(mmap=SimMmap)
    vars(aggregation).update(mmap=SimMmap)
    vars(modelwriter).update(os=SimOs())
    vars(session)["pb_grpc"] = SimpleNamespace(
        FederatedTrainingStub=lambda channel: channel.stub(pb_grpc.FederatedTrainingStub),
        AdminCommunicatingStub=lambda channel: channel.stub(pb_grpc.AdminCommunicatingStub),
    )
    vars(spool).update(os=SimOs(), Path=SimPath)
    vars(part_file).update(os=SimOs())
    vars(blobs).update(os=SimOs(), time=SimpleNamespace(time=now, monotonic=now))
    site_run.SiteRun._clear = _clear
    _remember()
    # Nobody asks here for all tasks of all loops.
    vars(asyncio.tasks)["_all_tasks"].add = lambda _task: None
    gc.collect()
    gc.freeze()  # what a history leaves is found without looking at all the modules again


def connect(found: network.Network) -> None:
    """Have the sites of this history dial into its network."""
    _NETWORK[:] = [found]
