"""The server: its real rooms on a simulated disk, behind a simulated wire."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import cache
from types import SimpleNamespace
from typing import Any

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FLError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.ports import Row
from flplatform.rpc import interceptors
from flplatform.rpc.interceptors import Caller
from flplatform.security.identity import Identity
from flplatform.server.client_manager import ClientManager
from flplatform.server.control import ServerControl
from flplatform.server.relay import RequestRelay
from flplatform.server.runs import Runs
from flplatform.server.server import FederatedServer
from flplatform.server.servicers import (
    FL_RULES,
    AdminCommunicatingServicer,
    FederatedTrainingServicer,
)
from flplatform.server.training import ModelResultProcessor, ResultProcessors, TrainingService
from flplatform.server.validation import ValidateResultProcessor
from flplatform.store.blobs import FileBlobStore
from tests.simulation.disk import Disks, File, Folder
from tests.simulation.network import CHUNKS, Network
from tests.simulation.system import SimPath
from tests.simulation.world import LoopExecutor, Process, World

DEAD_AFTER_S = 40.0
HEARTBEAT_S = 12.0
WAITING_CALL_S = 30.0
LONGEST_DOWNLOAD_S = 12.0


@cache
def identity(name: str, kind: Any = "site") -> Identity:
    """Return who a certificate would name."""
    return Identity(
        project="test",
        kind=kind,
        organisation=name,
        name=name,
        role="project_admin" if kind == "admin" else "",
        fingerprint=f"fingerprint of {name}",
        serial=1,
        not_after=datetime(2100, 1, 1, tzinfo=UTC),
    )


class Log:
    """The event log on the server's disk; what is in it is durable."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Row]] = {}
        self._decoded: dict[str, list[ev.Event]] = {}

    def events(self, stream: str) -> list[ev.Event]:
        """Return a stream's events."""
        rows = self.streams.get(stream, [])
        known = self._decoded.setdefault(stream, [])
        known += [ev.decode(row.type, row.version, row.body, stream) for row in rows[len(known) :]]
        return known

    def run(self, number: int) -> list[ev.Event]:
        """Return a run's events."""
        return self.events(ev.run_stream(number))

    def ended(self, number: int) -> bool:
        """Return whether a run has ended."""
        return isinstance(self.run(number)[-1], ev.RunEnded)

    def runs(self) -> list[int]:
        """Return the numbers of all runs that have begun."""
        return [int(name[4:]) for name in self.streams if name.startswith("run/")]


class LogStore:
    """`ports.StateStore` of one process over the log: group commit, then the futures."""

    trouble = ""

    def __init__(self, world: World, log: Log, host: Any, fatal: Callable[[], None]) -> None:
        self._world = world
        self._log = log
        self._host = host
        self._fatal = fatal
        self._group: list[tuple[tuple[Row, ...], Future[None]]] = []
        self.stored: Callable[[Sequence[Row]], None] = lambda _: None

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        """Append rows with the next group."""
        future: Future[None] = Future()
        if not self._group:
            self._world.loop.call_later(self._world.rng.random() * 0.02, self._commit)
        self._group.append((tuple(rows), future))
        return future

    def _commit(self) -> None:
        group, self._group = self._group, []
        if self._host.log_broken:
            self._host.log_broken = False
            self._world.count("met EIO at fsync")
            for rows, _ in group[: self._world.rng.randint(0, len(group))]:
                self._store(rows)
            self._fatal()
            return
        refusals: list[FLError | None] = [self._refusal(rows) for rows, _ in group]
        self._world.loop.call_later(
            self._world.rng.random() * 0.01, self._settle, list(zip(group, refusals, strict=True))
        )

    def _refusal(self, rows: Sequence[Row]) -> FLError | None:
        if self._host.full:
            self._world.count("met a full disk")
            return ResourceExhaustedError("no space left for the state store", rule="disk")
        heads: dict[str, int] = {}
        for row in rows:
            head = heads.setdefault(row.stream, len(self._log.streams.get(row.stream, ())))
            if row.seq != head + 1:
                return AlreadyExistsError(f"event {row.seq} of {row.stream} after {head}")
            heads[row.stream] += 1
        self._store(rows)
        return None

    def _store(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._log.streams.setdefault(row.stream, []).append(row)
        self.stored(rows)

    @staticmethod
    def _settle(outcomes: list[Any]) -> None:
        for (_, future), refusal in outcomes:
            if refusal is None:
                future.set_result(None)
            else:
                future.set_exception(refusal)

    def read(self, stream: str, after: int = 0) -> list[Row]:
        """Return the rows of a stream."""
        return self._log.streams.get(stream, [])[after:]

    def streams(self, prefix: str = "") -> list[str]:
        """Return the names of streams."""
        return sorted(name for name in self._log.streams if name.startswith(prefix))

    def extents(self) -> dict[str, tuple[int, int]]:
        """Return the number of rows and the highest seq of each stream."""
        return {name: (len(rows), rows[-1].seq) for name, rows in self._log.streams.items()}

    def close(self) -> None:
        """Nothing to close."""


class Blobs(FileBlobStore):
    """The real store; tells who looks on of each deletion."""

    deleting: Callable[[str], None] = staticmethod(lambda _: None)

    def delete(self, digest: str) -> None:
        """Remove a blob."""
        self.deleting(digest)
        super().delete(digest)


class Server:
    """One server process after the other, on one host.

    Attributes:
        acknowledged: every (task id, digest or mark) whose result was answered with a yes.
        up: the process, if one runs.
    """

    name = "server"
    _watch_clients = FederatedServer._watch_clients

    def __init__(self, world: World, disks: Disks, network: Network, watcher: Any) -> None:
        self.world = world
        self.disks = disks
        self.network = network
        self.watcher = watcher
        self.log = Log()
        self.up: Process | None = None
        self.boots = 0
        self.host_died = False
        disks.add("server")
        self.host = disks.hosts["server"]

    # ---- life ----

    def boot(self) -> None:
        """Start a process on what is on the disk."""
        self.up = self.world.process("server", self._died)
        self.boots += 1
        self.world.note("server", f"starts ({self.boots})")
        try:
            self.up.run(self._build)
        except OSError as error:
            self.up.kill(f"does not start: {error}")
            return
        if self.up is not None:
            self.network.server = self.up
            self.network.serve = self.serve

    def _build(self) -> None:
        process = self.up
        assert process is not None
        loop = self.world.loop
        self.store = LogStore(
            self.world, self.log, self.host, lambda: process.kill("exit 70: the store failed")
        )
        self.store.stored = self.watcher.stored
        self.blobs = Blobs(SimPath("/server/state/blobs"))  # type: ignore[arg-type]
        self.blobs.deleting = self.watcher.deleting
        self.relay = RequestRelay()
        self.clients = ClientManager(100, DEAD_AFTER_S, loop.time, self._clients_changed)
        self.runs = Runs(
            self.store, self.blobs, self.clients, self.relay, LoopExecutor(loop), self._notify
        )
        self.control = ServerControl(
            identity=identity("server", "server"),
            trust=SimpleNamespace(store=None),
            runs=self.runs,
            clients=self.clients,
            relay=self.relay,
            blobs=self.blobs,
            folder=SimPath("/server/state"),  # type: ignore[arg-type]
            end=lambda _restart: None,
        )
        processors = ResultProcessors([ModelResultProcessor(), ValidateResultProcessor()])
        self.training = TrainingService(self.runs, self.blobs, processors, WAITING_CALL_S)
        self._watch_wanted = asyncio.Event()
        self.fl = FederatedTrainingServicer(self.clients, self.relay, self.training, HEARTBEAT_S)
        self.admin = AdminCommunicatingServicer(self.relay, (), WAITING_CALL_S)
        self.runs.open()
        process.spawn(self._watch_clients())  # type: ignore[misc]

    def _notify(self, sites: set[str]) -> None:
        self.training.notify(sites)

    def _clients_changed(self, names: Sequence[str]) -> None:
        self._watch_wanted.set()
        self.runs.roster_changed(names)

    def _died(self, _why: str) -> None:
        self.up = None
        self.network.server = None
        self.network.server_died(self.host_died)

    def crash(self, host: bool) -> None:
        """End the process, or the whole machine."""
        self.host_died = host
        if self.up is not None:
            self.up.kill("host crash" if host else "kill -9")
        if host:
            self.host.crash(self.world.rng, self.world.loop.now)
            self.watcher.disk_restarted("server")
        self.host_died = False

    def fresh(self) -> set[str]:
        """Return who has been heard of lately."""
        since = self.world.loop.now - DEAD_AFTER_S / 2
        return {client.name for client in self.clients.clients() if client.last_seen > since}

    # ---- the wire ----

    async def serve(self, site: str, token: str, method: str, request: Any) -> Any:
        """Answer one call, as the guard and the servicers do."""
        who = identity(site)
        caller = Caller(who, "peer", token)
        interceptors._CALLER.set(caller)
        if method != "Register":
            self.clients.check_token(who, token)
        if method == "Upload":
            return await self._upload(caller, *request)
        if method == "Download":
            return await self._download(caller, *request)
        servicer = self.admin if method in ("Retrieve", "SendReply", "SendResult") else self.fl
        if method == "SubmitResult":
            self.watcher.submitted(site, request)
        reply = await getattr(servicer, method)(request, None)
        if method == "SubmitResult" and request.WhichOneof("outcome") == "result":
            self.watcher.acknowledged(request, reply.outcome)
        return reply

    async def _upload(self, caller: Caller, transfer_id: str, blob: ModelRef, data: bytes) -> bool:
        """Receive a blob; see `rpc.streams.BlobService`."""
        manifest = self.training.admit_upload(caller, transfer_id, blob)
        writer = await asyncio.to_thread(self.blobs.receive, transfer_id, blob, manifest)
        try:
            if writer.offset:
                self.world.count("transfer resumed")
            step = max(1, len(data) // CHUNKS)
            while writer.offset < blob.size:
                await asyncio.sleep(self.network.delay(caller.identity.name))
                if self.network.lost(caller.identity.name, up=True):
                    raise UnavailableError("nothing came")
                chunk = data[writer.offset : writer.offset + step]
                await asyncio.to_thread(writer.write, chunk)
            await asyncio.to_thread(writer.commit)
        except BaseException:
            writer.suspend()
            raise
        self.watcher.came(blob.digest, data)
        noted: Any = self.training.note_upload(caller, transfer_id, blob)
        if noted is not None:
            await noted
        return True

    async def _download(self, caller: Caller, digest: str, offset: int) -> bytes:
        self.training.release_download(caller, digest)
        if self.world.rng.random() < 0.3:
            await asyncio.sleep(min(LONGEST_DOWNLOAD_S, self.world.rng.expovariate(1 / 4.0)))
        data = self.blobs.path(digest).read_bytes()[offset:]
        if self.network.lost(caller.identity.name, up=False):
            data = data[: self.world.rng.randint(0, len(data))]
        return data

    # ---- what a blob takes ----

    def read(self, digest: str) -> bytes:
        """Return a blob's bytes.

        Raises:
            NotFoundError: it is not here.
        """
        name = digest.partition(":")[2]
        found = self.disks.find(f"/server/state/blobs/{name}")[1]
        if not isinstance(found, File):
            raise NotFoundError(f"no blob {digest}")
        return bytes(found.data)

    def blob_files(self) -> list[tuple[str, Any]]:
        """Return names and nodes of all blobs."""
        folder = self.disks.find("/server/state/blobs")[1]
        assert isinstance(folder, Folder)
        return [
            (name, node)
            for name, node in folder.entries.items()
            if isinstance(node, File) and not name.startswith(".")
        ]


__all__ = ["DEAD_AFTER_S", "FL_RULES", "Server", "identity"]
