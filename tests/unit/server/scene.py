"""The server's rooms without a port: runs on in-memory events, sites played by hand."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor, Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flplatform.core.errors import FLError
from flplatform.core.events import Event
from flplatform.core.messages import ModelRef, Task, TaskId
from flplatform.core.ports import Row
from flplatform.files.digest import digest_of
from flplatform.files.modelfile import save
from flplatform.rpc.interceptors import Caller
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.identity import Identity
from flplatform.security.package import Package, PackageManifest
from flplatform.server.client_manager import ClientManager
from flplatform.server.relay import RequestRelay
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs
from flplatform.server.training import ModelResultProcessor, ResultProcessors, TrainingService
from flplatform.server.validation import ValidateResultProcessor
from flplatform.store.blobs import FileBlobStore
from tests.support.stores import MemoryStateStore
from tests.support.workflows import job

DEADLINE_S = 60.0


def identity(name: str, organisation: str = "", fingerprint: str = "") -> Identity:
    """A site as its certificate names it."""
    return Identity(
        project="test",
        kind="site",
        organisation=organisation or name,
        name=name,
        role="",
        fingerprint=fingerprint or f"fingerprint of {name}",
        serial=1,
        not_after=datetime(2100, 1, 1, tzinfo=UTC),
    )


def play(scene: Coroutine[Any, Any, None]) -> None:
    """Run a scene to its end, within a deadline."""

    async def whole() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scene

    asyncio.run(whole())


async def until(true: Callable[[], Any]) -> None:
    """Let everybody work until something is so."""
    while not true():
        await asyncio.sleep(0.0005)


async def settle() -> None:
    """Let everything that is ready to run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Clock:
    """Monotonic seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class GatedStore(MemoryStateStore):
    """Settles appends only when told to.

    Attributes:
        appends: number of rows of each append.
        error: what the next append fails with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.appends: list[int] = []
        self.waiting: list[tuple[Sequence[Row], Future[None]]] = []
        self.gated = False
        self.error: Exception | None = None

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        self.appends.append(len(rows))
        if self.error:
            future: Future[None] = Future()
            future.set_exception(self.error)
            return future
        if not self.gated:
            return super().append(rows)
        waiting: Future[None] = Future()
        waiting.set_running_or_notify_cancel()
        self.waiting.append((rows, waiting))
        return waiting

    def let_go(self) -> None:
        rows, future = self.waiting.pop(0)
        super().append(rows)
        future.set_result(None)


class Scene:
    """Stores that outlive restarts, and around them the rooms of one server process.

    Attributes:
        notified: sites told that their tasks changed, in order.
    """

    def __init__(self, folder: Path, workers: Executor) -> None:
        self.folder = folder
        self._workers = workers
        self.store = MemoryStateStore()
        self.blobs = FileBlobStore(folder / "blobs")
        self.clock = Clock()
        self.notified: list[set[str]] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._files = 0
        self.boot()

    def boot(self) -> None:
        """Begin as a new process on the same stores."""
        self.clients = ClientManager(100, 60.0, self.clock, self._changed)
        self.relay = RequestRelay()
        self.runs = Runs(
            self.store, self.blobs, self.clients, self.relay, self._workers, self._notify
        )
        processors = ResultProcessors([ModelResultProcessor(), ValidateResultProcessor()])
        self.training = TrainingService(self.runs, self.blobs, processors, 5.0)

    def _changed(self, names: Iterable[str]) -> None:
        self.runs.roster_changed(list(names))

    def _notify(self, sites: set[str]) -> None:
        self.notified.append(sites)
        self.training.notify(sites)

    async def restart(self) -> None:
        """End this process without a goodbye, and go on with the next."""
        await self.close()
        self.boot()
        self.runs.open()

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._serving.clear()
        await self.runs.close()

    # ---- models ----

    def model(self, value: float = 0.0, size: int = 3) -> ModelRef:
        """Store a model of one tensor."""
        return self.blobs.create(
            lambda path: save(path, {"w": np.full(size, value, "f4")}) and None
        )

    def update(self, task: str | TaskId, value: float = 1.0) -> ModelRef:
        """Store a model as if its site had uploaded it for a task."""
        ref = self.model(value)
        self.runs.uploads.note(TaskId.parse(str(task)), ref.digest)
        return ref

    # ---- runs ----

    async def submit(
        self, sites: Iterable[str] = ("a", "b"), submission: str = "", **fields: Any
    ) -> int:
        """Open a run; `fields` as in job.yml."""
        fields = {"wait_after_min_s": 600.0, "min_clients": len(tuple(sites))} | fields
        spec = job(**fields)
        code = self.blobs.create(lambda path: path.write_bytes(b"the package") and None)
        return await self.runs.submit(
            self.package(spec, self.model()),
            identity("lead", "hub"),
            order=b"signed start",
            submission_id=submission or secrets.token_hex(16),
            blob=code,
            sites=tuple(sites),
            min_clients=None,
        )

    def package(self, spec: Any, model: ModelRef) -> Package:
        manifest = PackageManifest(
            project="test",
            job=spec.name,
            author="lead",
            model_digest=model.digest,
            model_size=model.size,
            files=(),
        )
        return Package(self.folder, identity("lead", "hub"), manifest, spec)

    def actor(self, run: int = 1) -> RunActor:
        return self.runs.actor(run)

    def events(self, run: int = 1, kind: type[Event] = Event) -> list[Any]:
        return [event for event in self.runs.view(run).events if isinstance(event, kind)]

    # ---- sites ----

    def live(self, *sites: str) -> None:
        for site in sites:
            self.clients.register(identity(site), "peer")

    def obeying(self, *sites: str) -> None:
        """Have sites register, and accept every run."""
        self.live(*sites)
        for site in sites:
            task = asyncio.create_task(self._obey(site))
            self._serving.add(task)

    async def _obey(self, site: str) -> None:
        received: list[str] = []
        while True:
            requests = await self.relay.retrieve(site, received, 60.0)
            received = [request.id for request in requests]
            for request in requests:
                self.relay.reply(site, pb.SiteReply(request_id=request.id, status="ok"))
            await asyncio.sleep(0)

    async def offered(self, site: str) -> Task:
        """Return a site's one open task, once there is one."""
        await until(lambda: self.runs.tasks.of(site))
        (task,) = self.runs.tasks.of(site)
        return task

    async def do(self, site: str, value: float = 1.0, **more: Any) -> str:
        """Hand in a plain result for a site's open task."""
        task = await self.offered(site)
        return await self.training.submit_result(site, self.result(task, value, **more))

    def result(
        self, task: Task, value: float = 1.0, examples: int = 10, upload: bool = True
    ) -> pb.SubmitResultRequest:
        outcome = pb.TaskOutcome(examples=examples, metrics={"loss": 0.5})
        if not task.id.owner:
            ref = self.update(task.id, value) if upload else self.model(value)
            outcome.blob.CopyFrom(pb.Blob(digest=ref.digest, size=ref.size))
        if task.id.kind == "train":
            assert task.model is not None
            outcome.trained_from = task.model.digest
        return pb.SubmitResultRequest(task_id=str(task.id), result=outcome)

    async def ended(self, run: int = 1) -> None:
        await until(lambda: self.runs.ended(run) and self.runs.summaries()[run - 1].ended)


def caller(name: str) -> Caller:
    return Caller(identity(name), "peer", "token")


async def refused(awaitable: Any) -> FLError:
    """Return the refusal that a call ends with."""
    try:
        await awaitable
    except FLError as error:
        return error
    raise AssertionError("was not refused")


OTHER_DIGEST = digest_of(b"nothing that is here")
