"""A site: the real loops of its parent process; the job's process is a function."""

import asyncio
import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

from flplatform.client.client import SiteClient
from flplatform.client.executors import RunProcess
from flplatform.client.frames import RESULT_FILE, UPDATE_FILE
from flplatform.client.policy import Plan, Purpose
from flplatform.client.requests import RequestAgent
from flplatform.client.run_spec import Outcome, RunProcessCrashed, RunSpec
from flplatform.client.session import Session
from flplatform.client.site_runs import SiteRuns
from flplatform.client.spool import Spool
from flplatform.client.state import USER_STATE, LocalScore, collect, current_state, submit
from flplatform.client.task_loop import TaskLoop
from flplatform.client.troubles import Troubles
from flplatform.core.config import Environment
from flplatform.core.errors import FLError, PermissionDeniedError
from flplatform.core.job import JobSpec
from flplatform.core.messages import SUBMIT_MODEL, TRAIN, ModelRef, Task, TaskFailure
from flplatform.files.durable import private_dir, write_atomic
from flplatform.security.signing import StartOrder
from flplatform.store.blobs import FileBlobStore
from tests.simulation import models
from tests.simulation.attendance import Attendance
from tests.simulation.disk import Disks
from tests.simulation.network import Network
from tests.simulation.server import identity
from tests.simulation.system import SimPath, SimShutil
from tests.simulation.world import PROCESS, Process, World

# ---- what is signed, without signatures ----------------------------------------------------------


class Order:
    """A signed start: JSON that everybody believes."""

    not_after = datetime(2026, 1, 8, tzinfo=UTC)

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.payload = json.loads(data)
        self.submission_id: str = self.payload["submission_id"]
        self.job_digest: str = self.payload["job_digest"]
        self.sites: tuple[str, ...] = tuple(self.payload["sites"])
        self.purpose: Purpose = self.payload["purpose"]

    def __getattr__(self, name: str) -> Any:
        return StartOrder.model_fields[name].default

    @classmethod
    def from_bytes(cls, data: bytes) -> "Order":
        """Read it."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """Write it."""
        return self._data


def start_order(
    submission_id: str, job_digest: str, sites: tuple[str, ...], purpose: Purpose = "train"
) -> bytes:
    """Return a start order."""
    fields = {
        "submission_id": submission_id,
        "job_digest": job_digest.partition(":")[2],
        "sites": sites,
        "purpose": purpose,
    }
    return json.dumps(fields).encode()


def open_order(_kind: Any, signed: Order, *_args: Any) -> tuple[Any, Order]:
    """Stand for `signing.open_order`."""
    return identity("lead", "admin"), signed


class Package:
    """A job package: its bytes are `job.yml` as JSON, and a comment.

    Attributes:
        model: the initial model, the same for all jobs of a history.
    """

    has_code = True
    model: ModelRef

    def __init__(self, path: SimPath) -> None:
        self._data = path.read_bytes()
        self.author = identity("lead", "admin")
        self.job = JobSpec.model_validate_json(self._data)

    def extract(self, folder: Any) -> None:
        """Write all files; durable on return, as the real one's."""
        private_dir(folder / "code")
        write_atomic(folder / "code" / "job.py", self._data)
        write_atomic(folder / "job.yml", self._data)


def open_package(path: SimPath, *_args: Any) -> Package:
    """Stand for `package.open_package`."""
    return Package(path)


class Audit:
    """Takes everything."""

    def record(self, *_args: Any, **_kwargs: Any) -> None:
        """Forget it."""


# ---- the job's process ---------------------------------------------------------------------------


class Box:
    """What a task left: see `client.box`."""

    def __init__(self, model: bytes, state: bytes) -> None:
        self._model = model
        self._state = state

    def collect_model(self, target: SimPath, _limit: int) -> None:
        """Copy the trained model."""
        target.write_bytes(self._model)

    def collect_state(self, target: SimPath, _limit: int) -> None:
        """Copy the state."""
        private_dir(target)  # type: ignore[arg-type]
        (target / "memory").write_bytes(self._state)


class JobProcess(RunProcess):
    """A `RunProcess` without a process; it crashes now and then, and takes its time."""

    world: World
    behaviour: "Behaviour"
    attendance: Attendance

    def __init__(self, spec: RunSpec, on_phase: Any = None, on_metric: Any = None) -> None:
        super().__init__(spec)
        self._aborted = False
        process = PROCESS.get()
        assert process is not None
        self._process = process
        self._site = process.name

    async def start(self, timeout_s: float = 0.0) -> None:
        """Take a while."""
        await asyncio.sleep(self.world.rng.random())
        self.attendance.processes[self] = self._process, self._spec.run

    async def abort(self, grace_s: float = 8.0) -> None:
        """End."""
        self._aborted = True
        await asyncio.sleep(self.world.rng.random())
        self.attendance.processes.pop(self, None)

    async def execute(self, task: Task, model: Any, work: Any) -> Outcome | TaskFailure:
        """Do a task: see `RunProcess.execute`."""
        behaviour, rng = self.behaviour, self.world.rng
        await asyncio.sleep(rng.expovariate(1 / behaviour.train_s))
        if self._aborted or rng.random() < behaviour.crash:
            self.world.count("run process crashed")
            raise RunProcessCrashed("crashed", "")
        if rng.random() < behaviour.failure:
            self.world.count("task failed")
            return TaskFailure("the code raised")
        return await asyncio.to_thread(self._do, task, model, work)

    def _do(self, task: Task, model: Any, work: Any) -> Outcome | TaskFailure:
        spec = self._spec
        SimShutil.rmtree(work, ignore_errors=True)
        private_dir(work)
        current = current_state(spec.state)
        if task.id.kind == SUBMIT_MODEL:
            score = submit(current, work)
            if score is None:
                return TaskFailure("no local model yet")
            return Outcome(RESULT_FILE, score.examples, score.metrics, {}, 0)
        received = model.read_bytes()
        accuracy = models.accuracy(received)
        if task.id.kind != TRAIN:
            return Outcome(None, 5, {"accuracy": accuracy}, {}, 0)
        before = (current / USER_STATE / "memory").read_bytes() if current else b""
        self.attendance.trains(spec.folder.parent, before)
        nonce = "" if self.behaviour.reproducible else str(self.world.rng.random())
        update = models.trained(received, task.seed, self._site, before, nonce)
        whole = models.whole(received, update) if spec.delta else update
        local = {"accuracy": models.accuracy(whole)}
        after = models.state_after(before, task.seed)
        self.attendance.trained(spec.folder.parent, after)
        box: Any = Box(whole, after)
        score = LocalScore(round=task.id.round, metrics=local, examples=5)
        collect(box, work, current, spec.watch, score, 1 << 20, 1 << 20)
        if spec.delta:
            (work / UPDATE_FILE).write_bytes(update)
        self.world.note(
            self._site, f"trained {task.id} with state {sha256(before).hexdigest()[:6]}"
        )
        examples = 5 + len(self._site)
        return Outcome(
            RESULT_FILE,
            examples,
            local,
            {"accuracy": accuracy},
            examples,
            update=UPDATE_FILE if spec.delta else None,
            delta=spec.delta,
        )


class Behaviour:
    """How jobs behave in this history."""

    def __init__(
        self, reproducible: bool, train_s: float, crash: float, failure: float, decline: float
    ) -> None:
        self.reproducible = reproducible
        self.train_s = train_s
        self.crash = crash
        self.failure = failure
        self.decline = decline


class _Policy:
    def __init__(self, world: World, behaviour: Behaviour) -> None:
        self._world = world
        self._behaviour = behaviour

    def check_job(self, *_args: Any, purpose: Purpose = "train", **_kwargs: Any) -> Plan:
        """Allow, but for a few."""
        if self._world.rng.random() < self._behaviour.decline:
            raise PermissionDeniedError("not today", rule="accept_jobs")
        return Plan({}, Environment(max_runs=16), "none", purpose=purpose)


# ---- the site ------------------------------------------------------------------------------------


class Program(SiteClient):
    """`SiteClient` with its loops, made of its real parts on a simulated disk."""

    def __init__(self, world: World, name: str, network: Network, behaviour: Behaviour) -> None:
        folder: Any = private_dir(SimPath(f"/{name}/state"))  # type: ignore[arg-type]
        site = SimpleNamespace(
            heartbeat_s=12.0,
            backoff_max_s=8.0,
            servers=("server",),
            proxy="",
            request_timeout_s=20.0,
            clock_skew_s=30.0,
        )
        trust: Any = SimpleNamespace(tls_roots=lambda _kind: b"")
        kit: Any = SimpleNamespace(
            identity=identity(name),
            folder=SimPath(f"/{name}"),
            state_folder=lambda: folder,
            site=site,
            trust=trust,
            chain=b"",
            key_pem=lambda: b"",
        )
        policy: Any = _Policy(world, behaviour)
        self._blobs = FileBlobStore(folder / "blobs")
        self._session = Session(kit, "none", lambda: self._runs.numbers())
        spool = Spool(folder / "spool")
        self._runs = SiteRuns(
            kit,
            policy,
            self._fetch,
            spool,
            lambda run: self._tasks.stop(run),
            lambda: trust,
            lambda *_: None,
        )
        limits: Any = SimpleNamespace(filters=(), max_examples=None)
        self._tasks = TaskLoop(
            self._session, self._runs, spool, self._blobs, limits, folder / "work"
        )
        self._agent = RequestAgent(
            trust=lambda: trust,
            policy=policy,
            seen=None,  # type: ignore[arg-type]
            runs=self._runs,
            audit=Audit(),
            verbs=(),
        )
        self._replies = set()
        self._received = []
        self._downloads = Troubles()

    @property
    def runs(self) -> list[int]:
        """The runs that the site has."""
        return self._runs.numbers()

    async def start(self) -> Mapping[str, Any]:
        """Begin, as the real one does."""
        self._runs.open(self._blobs.path)
        loops = (
            self._tasks.run(),
            self._session.repeat("get requests", self._retrieve),
            self._session.repeat("heartbeat", self._beat),
        )
        self._loops = [asyncio.create_task(loop) for loop in loops]
        return {}


class Site:
    """One site process after the other, on one host."""

    def __init__(
        self, world: World, disks: Disks, network: Network, name: str, behaviour: Behaviour
    ) -> None:
        self.world = world
        self.name = name
        self._network = network
        self._behaviour = behaviour
        self.up: Process | None = None
        self.program: Program | None = None
        self._host_died = False
        disks.add(name)
        self.host = disks.hosts[name]

    def boot(self) -> None:
        """Start a process on what is on the disk."""
        self.up = process = self.world.process(self.name, self._died)
        self.world.note(self.name, "starts")
        process.spawn(self._begin(process))

    async def _begin(self, process: Process) -> None:
        try:
            self.program = Program(self.world, self.name, self._network, self._behaviour)
            await self.program.start()
        except (OSError, FLError) as error:
            process.kill(f"does not start: {error}")

    def _died(self, _why: str) -> None:
        self.up = self.program = None
        self._network.site_died(self.name, self._host_died)

    def crash(self, host: bool) -> None:
        """End the process, or the whole machine."""
        self._host_died = host
        if self.up is not None:
            self.up.kill("host crash" if host else "kill -9")
        if host:
            self.host.crash(self.world.rng, self.world.loop.now)
        self._host_died = False


def encoded(order: bytes) -> str:
    """Return an order as events carry it."""
    return base64.b64encode(order).decode()
