"""Puts the simulated machine under the real programs, once per interpreter."""

import logging
import sys
from io import FileIO
from types import SimpleNamespace
from typing import Any

import numpy as np

from flplatform.client import executors, spool
from flplatform.core.model import Array
from flplatform.files import digest, durable, modelfile, writing
from flplatform.rpc import channel, streams
from flplatform.security import package, signing
from flplatform.server import aggregation
from flplatform.store import blobs
from tests.simulation import models, network, site
from tests.simulation.system import OpenFile, SimOs, SimPath, SimShutil, disks

_NETWORK: list[network.Network] = []
_INSTALLED: list[bool] = []


def _digest_of_file(path: SimPath) -> tuple[str, int]:
    data = path.read_bytes()
    return models.ref(data).digest, len(data)


def _set_aside(handle: int, _offset: int, _count: int) -> bool:
    return not disks().handles[handle][0].full


def _load(path: SimPath) -> dict[str, Array]:
    return {"w": np.array(models.values_of(path.read_bytes()), "f4")}


def _open_channel(_address: str, **_: Any) -> network.Channel:
    return network.connect(_NETWORK[-1])


def install() -> None:
    """Replace what reaches out of the programs: os, files, processes, signatures, gRPC.

    A function is replaced wherever it was imported to.
    """
    if _INSTALLED:
        return
    _INSTALLED.append(True)
    logging.getLogger("flplatform").setLevel(logging.CRITICAL + 1)
    replaced: dict[Any, Any] = {
        FileIO: OpenFile,
        digest.digest_of_file: _digest_of_file,
        modelfile.load: _load,
        writing.set_aside: _set_aside,
        writing.start_writing: lambda *_: None,
        streams.send_blob: network.send_blob,
        streams.fetch_blob: network.fetch_blob,
        channel.open_channel: _open_channel,
        package.open_package: site.open_package,
        signing.open_order: site.open_order,
        signing.Signed: site.Order,
        executors.RunProcess: site.JobProcess,
        aggregation.aggregate_closed: models.aggregate_closed,
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith(("flplatform.client", "flplatform.server", "flplatform.store")):
            continue
        for key, value in list(vars(module).items()):
            if getattr(value, "__module__", "") != name and value.__hash__ and value in replaced:
                setattr(module, key, replaced[value])
        if "shutil" in vars(module):
            vars(module)["shutil"] = SimShutil()

    def now() -> float:
        return disks().world.loop.now

    vars(durable).update(os=SimOs(), shutil=SimShutil())
    vars(spool).update(os=SimOs(), Path=SimPath)
    vars(blobs).update(os=SimOs(), time=SimpleNamespace(time=now, monotonic=now))


def connect(found: network.Network) -> None:
    """Have the sites of this history dial into its network."""
    _NETWORK[:] = [found]
