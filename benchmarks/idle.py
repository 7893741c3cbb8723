"""Idle sites: what it costs one server process that many sites are registered and wait.

The sites are real sessions with kits, certificates and connections of their own, many of them in
one process: heartbeats, one waiting `GetTask`, one waiting `Retrieve` each.
"""

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from flplatform.client.session import WAITING_CALL_S, Session
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.kit import Kit
from workspaces.running import Federation

PROCESSES = 4
"""Among which the sites are shared out."""

REGISTER_S = 120.0
STORM_S = 120.0


@dataclass(frozen=True)
class Idle:
    """What `sites` idle sites cost; memory in bytes, times in seconds.

    Attributes:
        provision_s: provisioning all of them.
        register_s: from the first registration until all are registered.
        core: share of one core that the server takes while all wait.
        bytes_each: growth of the server's own memory per site.
        storm_s: after the server was killed and started: until all are registered again.
        console_s: a command at the console while all wait.
    """

    sites: int
    provision_s: float
    register_s: float
    core: float
    bytes_each: float
    storm_s: float
    console_s: float


def measure(sites: int, watch_s: float) -> Idle:
    """Measure with `sites` sites, looking at the server for `watch_s` seconds."""
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    with tempfile.TemporaryDirectory(prefix="flbench-", ignore_cleanup_errors=True) as folder:
        begun = time.monotonic()
        federation = Federation(Path(folder), {name: {} for name in names})
        provisioned = time.monotonic() - begun
        with federation:
            federation.start("server")
            _registered(federation)  # a sign-in takes memory once, for its password hash
            before = _own_bytes(federation)
            begun = time.monotonic()
            with _sites(federation):
                _until_registered(federation, sites, REGISTER_S)
                registered = time.monotonic() - begun
                core = _core(federation, watch_s)
                grown = _own_bytes(federation) - before
                begun = time.monotonic()
                _registered(federation)
                console = time.monotonic() - begun
                federation.kill("server")
                federation.start("server")
                begun = time.monotonic()
                _until_registered(federation, sites, STORM_S)
                storm = time.monotonic() - begun
    return Idle(sites, provisioned, registered, core, grown / sites, storm, console)


@contextlib.contextmanager
def _sites(federation: Federation) -> Iterator[None]:
    kits = [str(federation.kit(name)) for name in federation.sites]
    made = []
    for number in range(PROCESSES):
        share = kits[number::PROCESSES]
        if share:
            command = [sys.executable, "-m", "benchmarks.idle"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE)
            assert process.stdin is not None
            process.stdin.write("\n".join(share).encode())
            process.stdin.close()
            made.append(process)
    try:
        yield
    finally:
        for process in made:
            process.kill()
            process.wait()


def _registered(federation: Federation) -> int:
    return int(federation.ask("check_status server")["data"]["server"]["registered"])


def _until_registered(federation: Federation, sites: int, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while (count := _registered(federation)) < sites:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} of {sites} sites registered within {deadline_s:.0f} s")
        time.sleep(0.2)


def _core(federation: Federation, watch_s: float) -> float:
    process = psutil.Process(federation.processes["server"].pid)
    before, begun = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(watch_s)
    return (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - begun)


def _own_bytes(federation: Federation) -> int:
    """Return the server's unique set size: its memory without what it shares or maps."""
    return int(psutil.Process(federation.processes["server"].pid).memory_full_info().uss)


async def _wait(session: Session) -> None:
    """Do what an idle site does."""

    async def beat() -> None:
        await session.training("Heartbeat", pb.HeartbeatRequest())
        await asyncio.sleep(session.heartbeat_s)

    async def task() -> None:
        await session.training("GetTask", pb.GetTaskRequest(), WAITING_CALL_S)

    async def request() -> None:
        await session.admin("Retrieve", pb.RetrieveRequest(), WAITING_CALL_S)

    await asyncio.gather(
        session.repeat("heartbeat", beat),
        session.repeat("get tasks", task),
        session.repeat("get requests", request),
    )


async def _main(kits: list[str]) -> None:
    sessions = [Session(Kit.open(Path(kit)), "none", list) for kit in kits]
    await asyncio.gather(*map(_wait, sessions))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.disable(logging.WARNING)  # thousands of tries while the server is away
    asyncio.run(_main(sys.stdin.read().split()))
