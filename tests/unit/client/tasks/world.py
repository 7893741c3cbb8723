"""A site's task loop in a world of its own: a session, runs, blobs."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np

from flplatform.client.executors import Outcome
from flplatform.client.spool import Spool, SpooledResult
from flplatform.client.state import BASE_MODEL, current_state
from flplatform.client.task_loop import TaskLoop
from flplatform.client.troubles import Troubles
from flplatform.core.config import SitePolicy
from flplatform.core.errors import ResourceExhaustedError, UnavailableError
from flplatform.core.messages import ModelRef, TaskFailure, TaskId
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import save
from flplatform.files.shortage import explaining_shortage
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.store.blobs import FileBlobStore

TRAIN = "7/1/train/site-1"


NEXT = "7/2/train/site-1"


VALIDATE = "7/2/validate.global/site-1"


SUBMIT = "7/2/submit_model/site-1"


OTHER = "8/1/train/site-1"


class FakeSession:
    """A server in one object; `persist` tries again at once where the real one pauses.

    Attributes:
        calls: what was asked for, in order.
        answers: what `SubmitResult` of a task comes to, one after the other; then it is accepted.
        uploads: likewise for uploads.
    """

    def __init__(self, blobs, source):
        self._blobs, self._source = blobs, source
        self._replies: asyncio.Queue = asyncio.Queue()
        self._changed = asyncio.Event()
        self.calls: list[str] = []
        self.asked: list[pb.GetTaskRequest] = []
        self.submitted: list[pb.SubmitResultRequest] = []
        self.answers: dict[str, list[object]] = {}
        self.uploads: dict[str, list[object]] = {}

    def offer(self, *tasks, ended=()):
        """Let the next `GetTask` return these."""
        found = [task if isinstance(task, pb.Task) else pb.Task(id=task) for task in tasks]
        runs = [pb.EndedRun(run=run, status="finished") for run in ended]
        self._replies.put_nowait(pb.GetTaskReply(tasks=found, ended=runs))

    async def until(self, condition):
        """Wait for something that a call brings about."""
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def training(self, method, request, timeout_s=0):
        if method == "GetTask":
            self.asked.append(request)
            self._changed.set()
            return await self._replies.get()
        what = "result" if request.HasField("result") else "failure"
        self._note(f"{what} {request.task_id}")
        await self._come_to(self.answers, request.task_id)
        self.submitted.append(request)
        self._note(f"took {request.task_id}")
        return pb.SubmitResultReply(outcome="accepted")

    async def transfer(self, move):
        return await move(self, "token")

    async def send(self, task_id, path, blob):
        self._note(f"upload {task_id}")
        assert digest_of_file(path) == (blob.digest, blob.size)
        await self._come_to(self.uploads, task_id)

    async def fetch(self, blob):
        self._note(f"download {blob.digest[-4:]}")
        await self._come_to(self.uploads, blob.digest)
        self._blobs.create(lambda path: path.write_bytes(self._source[blob.digest]))
        return self._blobs.path(blob.digest)

    async def persist(self, what, step):
        for _ in range(5):
            again = contextlib.suppress(UnavailableError, ResourceExhaustedError)
            with again, explaining_shortage():
                return await step()
            await asyncio.sleep(0)
        raise AssertionError(what)

    async def repeat(self, what, step):
        while True:
            await step()

    async def _come_to(self, script, key):
        await asyncio.sleep(0)
        answer = script[key].pop(0) if script.get(key) else None
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        elif callable(answer):
            answer()
        elif answer is not None:
            raise answer

    def _note(self, call):
        self.calls.append(call)
        self._changed.set()


class FakeRun:
    """A `SiteRun` that does what its script says.

    Attributes:
        does: what executing a task comes to: an event to wait for, an error, a failure, or arrays.
    """

    def __init__(self, session, folder, number):
        self._session, self.number = session, number
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.turn = asyncio.Lock()
        self.run = number
        self.plan = SimpleNamespace(purpose="train")
        self.job = SimpleNamespace(codec="none", codec_down="none")
        self.package = SimpleNamespace(job=self.job)
        self.models = []
        self.troubles = Troubles()
        self.does: dict[str, list[object]] = {}
        self.phases: list[str] = []

    def enter(self, phase):
        self.phases.append(phase)

    async def execute(self, task, model, work):
        async with self.turn:
            key = str(task.id)
            self._session._note(f"begin {key}")
            self.models.append(model)
            arrays = {"w": np.full(4, 3, np.float32)}
            for step in self.does.get(key, []):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, BaseException):
                    raise step
                elif isinstance(step, TaskFailure):
                    return step
                elif callable(step):
                    await step()
                else:
                    arrays = step
            work.mkdir(parents=True)
            file = None
            if not task.id.owner:
                file = "result.safetensors"
                save(work / file, arrays)
            if task.id.kind == "train":
                (work / "state").mkdir()
                (work / "state" / "counter").write_text(key)
            current = current_state(self.state)
            if task.id.kind == "submit_model" and current:
                (work / BASE_MODEL).hardlink_to(current / BASE_MODEL)
            received = {"acc": 0.5} if model else {}
            return Outcome(file, 100, {"loss": 1.0}, received, 90)


class World:
    """A site's folders; `loop()` is what stands on them after each start."""

    def __init__(self, folder):
        self.folder = folder
        self.source: dict[str, bytes] = {}
        self.policy = SitePolicy()
        self.blobs = FileBlobStore(folder / "blobs")
        self.session = FakeSession(self.blobs, self.source)
        self.runs = {n: FakeRun(self.session, folder / f"run-{n}", n) for n in (7, 8)}
        self.ended: list[tuple[int, str]] = []
        self.ending: list[asyncio.Task[None]] = []
        self.waiting: dict[int, asyncio.Event] = {}
        self.tasks: TaskLoop

    def model(self, value: float = 1.0) -> pb.Blob:
        """Make a model that the server can send."""
        path = self.folder / f"model-{len(self.source)}"
        save(path, {"w": np.full(4, value, np.float32)})
        digest, size = digest_of_file(path)
        self.source[digest] = path.read_bytes()
        return pb.Blob(digest=digest, size=size)

    def _end(self, number, status):
        self.runs.pop(number, None)
        self.ended.append((number, status))
        self.ending.append(asyncio.create_task(self._stop(number)))

    async def _ready(self, number):
        if number in self.waiting:
            await self.waiting[number].wait()
        return self.runs.get(number)

    async def _stop(self, number):
        await self.tasks.stop(number)
        self.spool.drop_run(number)

    @contextlib.asynccontextmanager
    async def loop(self):
        self.news = asyncio.Event()
        runs = SimpleNamespace(
            ready=self._ready,
            held=self.runs.get,
            token=self.runs.get,
            all=lambda: list(self.runs.values()),
            numbers=lambda: sorted(self.runs),
            needed_blobs=set,
            end=self._end,
            news=self.news,
        )
        self.spool = Spool(self.folder / "spool")
        self.tasks = TaskLoop(
            self.session, runs, self.spool, self.blobs, self.policy, self.folder / "work"
        )
        working = asyncio.create_task(self.tasks.run())
        try:
            yield self.session
            assert not working.done(), working.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await self.tasks.close()

    async def idle(self):
        """Wait until nothing is in hand."""
        async with asyncio.timeout(60):
            while workers := list(self.tasks._workers.values()):
                await asyncio.wait(workers)
                await asyncio.sleep(0)

    def commit(self, task_id: str, state: bool = True) -> None:
        """Leave a result in the spool, as a predecessor of this process did."""
        work = self.folder / "left"
        work.mkdir()
        save(work / "result.safetensors", {"w": np.zeros(4, np.float32)})
        if state:
            (work / "state").mkdir()
            (work / "state" / "counter").write_text("left")
        blob = ModelRef(*digest_of_file(work / "result.safetensors"))
        Spool(self.folder / "spool").commit(SpooledResult(TaskId.parse(task_id), blob, 5), work)

    def counter(self, run: int = 7) -> str | None:
        current = current_state(self.runs[run].state)
        return (current / "counter").read_text() if current else None

    @property
    def entries(self) -> list[str]:
        return [str(entry.task_id) for entry in Spool(self.folder / "spool").entries()]


def play(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(bounded())


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def fails(world, task: pb.Task) -> pb.TaskFailure:
    """Return the failure that is reported for a task; nothing is left of the task."""

    async def go():
        async with world.loop() as session:
            session.offer(task)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert session.submitted[0].task_id == task.id
            assert session.submitted[0].HasField("failure")
            return session.submitted[0].failure

    failure = play(go())
    assert world.entries == []
    assert list((world.folder / "work").iterdir()) == []
    assert world.counter() is None
    return failure
