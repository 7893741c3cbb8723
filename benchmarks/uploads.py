"""Control beside uploads: how long a heartbeat and a console command take while sites upload.

The uploading sites are real sessions of the client's code in a process of their own; they answer
their start orders, take their tasks, and upload at one signal. Heartbeats and commands are timed
in this process, on connections that are open already.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.echo import write_job
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.client.session import WAITING_CALL_S, Session
from flplatform.core.messages import TRAIN, ModelRef, TaskId
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import load_copy, save
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.kit import Kit
from flplatform.store.blobs import FileBlobStore
from workspaces.running import ADMIN, Federation

IDLE_TRIES = 30
READY_S = 120.0
WATCHER = "watcher"


@dataclass(frozen=True)
class Uploads:
    """What was measured; seconds.

    Attributes:
        sites: that uploaded at once.
        size: bytes that each of them uploaded.
        uploads_s: until the last upload was through.
        idle_heartbeat_s, idle_command_s: the longest of some before the uploads.
        heartbeat_s, command_s: the longest during the uploads.
        median_heartbeat_s, median_command_s: medians during the uploads.
        tries: of each during the uploads.
    """

    sites: int
    size: int
    uploads_s: float
    idle_heartbeat_s: float
    idle_command_s: float
    heartbeat_s: float
    command_s: float
    median_heartbeat_s: float
    median_command_s: float
    tries: int


def measure(sites: int, size: int) -> Uploads:
    """Measure with `sites` sites that upload `size` bytes each."""
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    with (
        tempfile.TemporaryDirectory(prefix="flbench-", ignore_cleanup_errors=True) as folder,
        Federation(Path(folder), {name: {} for name in (*names, WATCHER)}) as federation,
    ):
        federation.start("server")
        command = [sys.executable, "-m", "benchmarks.uploads", folder]
        kits = [str(federation.kit(name)) for name in names]
        uploading = subprocess.Popen(
            [*command, *kits], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            federation.wait_for(lambda: _registered(federation) == sites, "registrations", "server")
            write_job(federation, sites, size, 1)
            done = federation.console("submit_job echo")
            if done.returncode:
                raise RuntimeError(f"{done.stdout}\n{done.stderr}")
            return asyncio.run(_measure(federation, uploading, sites, size))
        finally:
            uploading.kill()
            uploading.communicate()


def _registered(federation: Federation) -> int:
    return int(federation.ask("check_status server")["data"]["server"]["registered"])


async def _measure(
    federation: Federation, uploading: "subprocess.Popen[bytes]", sites: int, size: int
) -> Uploads:
    assert uploading.stdin is not None
    assert uploading.stdout is not None
    loop = asyncio.get_running_loop()
    readline = uploading.stdout.readline
    async with asyncio.timeout(READY_S):
        if await loop.run_in_executor(None, readline) != b"ready\n":
            raise RuntimeError(f"the sites have failed\n{federation.output('server')}")
    session = Session(Kit.open(federation.kit(WATCHER)), "none", list)
    passphrase = federation.passphrase_file().read_text().strip()
    transport = GrpcTransport(Credentials.open(Kit.open(federation.kit(ADMIN)), passphrase))
    await transport.connect()

    async def beat() -> None:
        await session.training("Heartbeat", pb.HeartbeatRequest())

    async def command() -> None:
        async for _ in transport.execute(["check_status", "server"], False):
            pass

    try:
        for step in (beat, command):  # connections open, caches warm
            await step()
        idle_beats = [await _timed(beat) for _ in range(IDLE_TRIES)]
        idle_commands = [await _timed(command) for _ in range(IDLE_TRIES)]
        begun = time.monotonic()
        uploading.stdin.write(b"go\n")
        uploading.stdin.flush()
        over = loop.run_in_executor(None, readline)
        beats, commands = list[float](), list[float]()
        while not over.done():
            beats.append(await _timed(beat))
            commands.append(await _timed(command))
        if await over != b"done\n":
            raise RuntimeError(f"an upload has failed\n{federation.output('server')}")
        return Uploads(
            sites=sites,
            size=size,
            uploads_s=time.monotonic() - begun,
            idle_heartbeat_s=max(idle_beats),
            idle_command_s=max(idle_commands),
            heartbeat_s=max(beats),
            command_s=max(commands),
            median_heartbeat_s=statistics.median(beats),
            median_command_s=statistics.median(commands),
            tries=len(beats),
        )
    finally:
        await transport.close()
        await session.close("measured")


async def _timed(step: Callable[[], Awaitable[None]]) -> float:
    begun = time.monotonic()
    await step()
    return time.monotonic() - begun


# ---- the sites' process ----


async def _answer(session: Session) -> None:
    """Accept whatever the server asks."""
    received: list[str] = []

    async def step() -> None:
        nonlocal received
        reply = await session.admin(
            "Retrieve", pb.RetrieveRequest(received=received), WAITING_CALL_S
        )
        received = [request.id for request in reply.requests]
        for name in received:
            await session.admin("SendReply", pb.SiteReply(request_id=name, status="ok", body=b"{}"))

    await session.repeat("answer", step)


async def _prepare(session: Session, folder: Path) -> Callable[[], Awaitable[None]]:
    """Take a task and make its result; return what uploads it."""
    folder.mkdir()
    reply = pb.GetTaskReply()
    while not any(TaskId.parse(task.id).kind == TRAIN for task in reply.tasks):
        reply = await session.training("GetTask", pb.GetTaskRequest(), WAITING_CALL_S)
    task = reply.tasks[0]
    model = ModelRef(task.model.digest, task.model.size)
    blobs = FileBlobStore(folder / "blobs")
    path = await session.transfer(
        lambda channel, token: fetch_blob(channel, model, blobs, token=token)
    )
    arrays = load_copy(path)
    for array in arrays.values():
        array += sum(folder.name.encode()) % 1000  # every site's update is its own
    save(folder / "update", arrays)
    update = ModelRef(*digest_of_file(folder / "update"))

    async def upload() -> None:
        await session.persist(
            "upload",
            lambda: session.transfer(
                lambda channel, token: send_blob(
                    channel, folder / "update", update, task.id, token=token
                )
            ),
        )

    return upload


async def _main(folder: Path, kits: list[Path]) -> None:
    sessions = [Session(Kit.open(kit), "none", list) for kit in kits]
    for session in sessions:
        await session.register("")
    answering = [asyncio.create_task(_answer(session)) for session in sessions]
    uploads = await asyncio.gather(
        *(_prepare(session, folder / kit.name) for session, kit in zip(sessions, kits, strict=True))
    )
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(upload() for upload in uploads))
    print("done", flush=True)
    for task in answering:
        task.cancel()


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    asyncio.run(_main(Path(sys.argv[1]), [Path(kit) for kit in sys.argv[2:]]))
