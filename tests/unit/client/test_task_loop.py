"""Tasks at a site: done once, sent until answered, settled by the answer."""

import asyncio
import contextlib
import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flplatform.client import answering, cache
from flplatform.client import spool as spool_module
from flplatform.client import task_loop as module
from flplatform.client.executors import JobCodeError, Outcome, RunProcessCrashed
from flplatform.client.spool import Spool, SpooledResult
from flplatform.client.state import BASE_MODEL, current_state
from flplatform.client.task_loop import TaskLoop
from flplatform.client.troubles import Troubles
from flplatform.core.config import Component, SitePolicy
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef, TaskFailure, TaskId
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import load_copy, save
from flplatform.files.shortage import explaining_shortage
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.wire import make_wire
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


@pytest.fixture
def world(tmp_path, monkeypatch):
    async def fetch(channel, blob, blobs, *, token):
        return blobs.path(blob.digest) if blobs.has(blob.digest) else await channel.fetch(blob)

    async def send(channel, path, blob, transfer_id, *, token):
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(cache, "fetch_blob", fetch)
    monkeypatch.setattr(answering, "send_blob", send)
    monkeypatch.setattr(module, "RETRY_S", 0)
    return World(tmp_path)


def play(coroutine):
    async def bounded():
        return await asyncio.wait_for(coroutine, 60)

    return asyncio.run(bounded())


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_task_from_offer_to_settlement(world):
    async def go():
        async with world.loop() as session:
            model = world.model()
            session.offer(pb.Task(id=TRAIN, seed=3, model=model))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls == [
                f"download {model.digest[-4:]}",
                f"begin {TRAIN}",
                f"upload {TRAIN}",
                f"result {TRAIN}",
                f"took {TRAIN}",
            ]
            assert [list(ask.held) for ask in session.asked] == [[], [TRAIN]]
            assert list(session.asked[0].runs) == [7, 8]
            result = session.submitted[0].result
            assert (result.examples, result.received_examples) == (100, 90)
            assert (dict(result.metrics), dict(result.received)) == ({"loss": 1}, {"acc": 0.5})
            assert result.trained_from == model.digest
            assert result.blob.size > 0
        assert world.counter() == TRAIN
        assert world.entries == []
        assert world.runs[7].phases[0] == "downloading"
        assert world.runs[7].phases[-1] == "idle"
        assert list((world.folder / "work").iterdir()) == []

    play(go())


def test_validation_has_no_model_and_no_state(world):
    async def go():
        async with world.loop() as session:
            world.policy = SitePolicy(max_examples=1)
            session.offer(pb.Task(id=VALIDATE, model=world.model()))
            await session.until(lambda: session.submitted)
            await world.idle()
            result = session.submitted[0].result
            assert not result.HasField("blob")
            assert (result.examples, result.trained_from) == (100, "")
            assert not any(call.startswith("upload") for call in session.calls)
        assert world.counter() is None

    play(go())


def test_a_task_in_hand_is_not_begun_again(world):
    async def go():
        async with world.loop() as session:
            gate = asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            for _ in range(3):
                session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            gate.set()
            await session.until(lambda: session.submitted)
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


def test_answered_while_the_offer_was_on_its_way(world):
    """A reply may still list what was answered since; it is not done again for that."""

    async def go():
        async with world.loop() as session:
            gate, ending = asyncio.Event(), asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)

            async def offer(_tasks, **_):
                gate.set()
                await session.until(lambda: f"took {TRAIN}" in session.calls)
                await world.idle()
                ending.set()

            world.tasks._cache.offer = offer
            session.offer(TRAIN)
            await ending.wait()
            await session.until(lambda: len(session.asked) == 3)
            await settle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            # If it is still open for the server then, it is done again.
            session.offer(TRAIN)
            await session.until(lambda: session.calls.count(f"begin {TRAIN}") == 2)

    play(go())


def test_a_withdrawn_task_is_cancelled(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [asyncio.Event()]
            world.runs[8].does[OTHER] = [gate := asyncio.Event()]
            session.offer(TRAIN, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer(OTHER)
            await session.until(lambda: len(session.asked) == 3)
            assert list(session.asked[2].held) == [OTHER]
            async with world.runs[7].turn:
                pass
            gate.set()
            await session.until(lambda: session.submitted)
            session.offer(NEXT)
            await session.until(lambda: f"begin {NEXT}" in session.calls)
        assert not any(call.endswith(TRAIN) and "begin" not in call for call in session.calls)

    play(go())


def test_several_are_withdrawn_at_once(world):
    """One that ends by itself while another is still being cancelled is no stumbling block."""

    async def go():
        async with world.loop() as session:
            cancelled = asyncio.Event()

            async def stubborn():
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()
                    await settle()

            world.runs[7].does[TRAIN] = [stubborn]
            world.runs[8].does[OTHER] = [cancelled, RunProcessCrashed("by itself")]
            session.offer(TRAIN, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            assert list(session.asked[2].held) == []
            await world.idle()

    play(go())


class Stubborn:
    """Job code that takes its time to end once it is cancelled."""

    def __init__(self):
        self.cancelled, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
            await self.may_end.wait()


def test_who_takes_its_time_to_end_holds_up_only_its_own_run(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.offer(TRAIN)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer(NEXT, OTHER)
            await stubborn.cancelled.wait()
            await session.until(lambda: f"took {OTHER}" in session.calls)
            assert [set(asked.held) for asked in session.asked[1:]] == [{TRAIN}, {NEXT, OTHER}]
            assert "downloading" not in world.runs[7].phases
            assert f"begin {NEXT}" not in session.calls
            stubborn.may_end.set()
            await session.until(lambda: f"took {NEXT}" in session.calls)
            assert world.runs[7].phases[0] == "idle", "the first is through before the next begins"

    play(go())


def test_who_is_wanted_again_while_it_ends_begins_anew_after_that(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.offer(TRAIN)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer()
            await stubborn.cancelled.wait()
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            assert [list(asked.held) for asked in session.asked[2:]] == [[], [TRAIN]]
            world.runs[7].does[TRAIN] = []
            stubborn.may_end.set()
            # Now the server is told that nobody has it in hand; its answer is the task.
            await session.until(lambda: len(session.asked) == 5)
            assert list(session.asked[4].held) == []
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_a_run_that_takes_its_time_to_end_holds_up_no_other(world):
    async def go():
        world.commit(SUBMIT, state=False)
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [stubborn := Stubborn()]
            session.answers[SUBMIT] = [asyncio.Event()]
            session.offer(TRAIN, SUBMIT)
            await session.until(lambda: f"begin {TRAIN}" in session.calls)
            session.offer(OTHER, ended=[7])
            await stubborn.cancelled.wait()
            await session.until(lambda: f"took {OTHER}" in session.calls)
            (ending,) = world.ending
            assert not ending.done()
            stubborn.may_end.set()
            await ending
            assert world.entries == []
        assert f"took {SUBMIT}" not in session.calls

    play(go())


def test_a_withdrawn_task_that_is_being_answered_goes_on(world):
    async def go():
        async with world.loop() as session:
            gate = asyncio.Event()
            session.answers[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            # The server is not asked about it any more, but its answer counts.
            assert list(session.asked[2].held) == []
            session.offer()
            await session.until(lambda: len(session.asked) == 4)
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


class SlowCommit:
    """A `Spool.commit` that waits before it comes to what its script says, then to the real one."""

    def __init__(self, monkeypatch, *script):
        self._loop, self._real, self._script = asyncio.get_running_loop(), Spool.commit, [*script]
        self.begun, self.may_go_on = asyncio.Event(), threading.Event()
        commits = self
        monkeypatch.setattr(Spool, "commit", lambda spool, *args: commits(spool, *args))

    def __call__(self, *args):
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.may_go_on.wait(60)
        if self._script:
            raise self._script.pop(0)
        self._real(*args)


def test_a_result_that_comes_into_the_spool_while_its_task_is_withdrawn_is_sent(world, monkeypatch):
    """Else nobody would ever send or drop it."""

    async def go():
        commit = SlowCommit(monkeypatch)
        async with world.loop() as session:
            session.answers[TRAIN] = [FailedPreconditionError("the round is closed")]
            session.offer(TRAIN)
            await commit.begun.wait()
            session.offer()
            await session.until(lambda: len(session.asked) == 3)
            commit.may_go_on.set()
            await world.idle()
            assert f"result {TRAIN}" in session.calls
            assert world.entries == []
            assert not world.tasks._answers.begun

    play(go())


def test_a_withdrawn_task_whose_result_cannot_be_spooled_is_cancelled(world, monkeypatch):
    async def go():
        commit = SlowCommit(monkeypatch, OSError(errno.EIO, "broken"))
        async with world.loop() as session:
            real, gate = session.persist, asyncio.Event()

            async def persist(what, step):
                try:
                    return await real(what, step)
                except OSError:
                    await gate.wait()  # the pause before the next try

            session.persist = persist
            session.offer(TRAIN)
            await commit.begun.wait()
            commit.may_go_on.set()
            await session.until(lambda: len(session.asked) == 2)
            while world.tasks._answers.begun:
                await asyncio.sleep(0.001)
            session.offer()
            await world.idle()
            assert f"result {TRAIN}" not in session.calls
            assert list((world.folder / "work").iterdir()) == []

    play(go())


def test_a_withdrawn_task_that_is_offered_again_is_held(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [gate := asyncio.Event()]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 4)
            assert [list(ask.held) for ask in session.asked[2:]] == [[], [TRAIN]]
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_a_broken_wire_trains_nothing_again(world):
    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [UnavailableError("cut"), UnavailableError("cut")]
            session.answers[TRAIN] = [
                UnavailableError("cut"),
                FailedPreconditionError("bytes?", rule="upload_first"),
            ]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.calls.count(f"upload {TRAIN}") == 5
            assert session.calls.count(f"result {TRAIN}") == 3
        assert world.counter() == TRAIN

    play(go())


def test_a_lost_acknowledgement(world):
    """The upload is refused since its task is settled; the result itself is asked about."""

    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [FailedPreconditionError("the task is not open")]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


def test_what_is_spooled_comes_first_after_a_restart(world):
    async def go():
        world.commit(TRAIN)
        (world.folder / "work" / "rest").mkdir(parents=True)
        async with world.loop() as session:
            gate = asyncio.Event()
            session.answers[TRAIN] = [gate]
            session.offer(TRAIN, NEXT)
            await session.until(lambda: len(session.asked) == 2)
            assert [list(ask.held) for ask in session.asked] == [[TRAIN], [TRAIN, NEXT]]
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await settle()
            assert session.calls == [f"upload {TRAIN}", f"result {TRAIN}"]
            gate.set()
            await session.until(lambda: f"begin {NEXT}" in session.calls)
            assert world.counter() == "left"
            assert f"begin {TRAIN}" not in session.calls
            await session.until(lambda: f"took {NEXT}" in session.calls)
            await world.idle()
        assert world.counter() == NEXT
        assert not (world.folder / "work" / "rest").exists()

    play(go())


def test_a_start_on_a_full_disk_still_asks_for_tasks(world, monkeypatch):
    """No folder can be made: tasks fail one by one, and the site goes on asking."""

    async def go():
        (world.folder / "work" / "rest").mkdir(parents=True)
        async with world.loop() as session:

            def full(*_args, **_kwargs):
                raise OSError(errno.ENOSPC, "no space left on device")

            monkeypatch.setattr(Path, "mkdir", full)
            await session.until(lambda: len(session.asked) == 1)
        assert not (world.folder / "work" / "rest").exists()

    play(go())


def test_a_spooled_result_of_an_unknown_run(world):
    async def go():
        world.commit("9/1/train/site-1")
        async with world.loop() as session:
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.entries == []

    play(go())


def test_a_result_waits_for_the_next_start_if_the_server_is_away(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [asyncio.Event()]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
        assert world.entries == [TRAIN]
        assert world.counter() is None
        session.answers.clear()
        async with world.loop():
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
        assert session.calls.count(f"begin {TRAIN}") == 1
        assert world.counter() == TRAIN

    play(go())


@pytest.mark.parametrize(
    "answer",
    [AlreadyExistsError("settled"), FailedPreconditionError("closed"), NotFoundError("no run")],
)
def test_a_result_that_nobody_wants_is_dropped_with_its_state(world, answer):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [answer]
            session.offer(TRAIN)
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await world.idle()
            assert session.submitted == []
        assert world.counter() is None
        assert world.entries == []

    play(go())


@pytest.mark.parametrize("where", ["answers", "uploads"])
@pytest.mark.parametrize("error", [InvalidArgumentError("odd"), PermissionDeniedError("no")])
def test_a_refused_result_is_a_failure(world, where, error):
    async def go():
        async with world.loop() as session:
            getattr(session, where)[TRAIN] = [error]
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert session.submitted[0].failure.error == f"the server refused it: {error}"
        assert world.counter() is None
        assert world.entries == []

    play(go())


@pytest.mark.parametrize("cut", ["gone", "short"])
def test_a_result_whose_bytes_are_gone_is_made_again(world, cut):
    """What the wire raises then is no answer of the server's."""

    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            file = world.spool.file(TaskId.parse(TRAIN))

            def lose():
                if cut == "gone":
                    file.unlink()
                    raise FileNotFoundError(file)
                os.truncate(file, 5)
                raise DataLossError("ends at 5")

            session.uploads[TRAIN] = [lose]
            await session.until(lambda: f"upload {TRAIN}" in session.calls)
            await world.idle()
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.counter() == TRAIN

    play(go())


def bad_sector(*_args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_result_that_can_never_be_read_is_made_again(world, monkeypatch):
    """The spool would offer the same sector for ever, and the task would never be answered."""

    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            with monkeypatch.context() as patch:
                patch.setattr(spool_module, "digest_of_file", bad_sector)
                session.uploads[TRAIN] = [bad_sector]
                await session.until(lambda: f"upload {TRAIN}" in session.calls)
                await world.idle()
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert session.submitted[0].HasField("result")
        assert world.counter() == TRAIN

    play(go())


@pytest.mark.parametrize("refusals", [0, 3])
def test_a_result_that_can_be_read_later_is_not_made_again(world, monkeypatch, refusals):
    real, left = spool_module.digest_of_file, [bad_sector] * refusals

    async def go():
        world.commit(TRAIN)
        monkeypatch.setattr(
            spool_module, "digest_of_file", lambda path: left.pop()() if left else real(path)
        )
        world.session.uploads[TRAIN] = [bad_sector]
        async with world.loop() as session:
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"upload {TRAIN}") == 2
            assert not left
        assert world.counter() == "left"

    play(go())


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_result_of_which_nobody_can_tell_what_it_is_is_made_again(world, monkeypatch, number):
    """But not for a shortage of this machine's: that passes."""
    real = Path.read_bytes

    def read_bytes(self):
        if self.name == "result.json" and refusals and refusals.pop():
            raise OSError(number, os.strerror(number))
        return real(self)

    refusals = [True] * (answering.READ_TRIES if number == errno.EIO else 2)

    async def go():
        async with world.loop() as session:
            await session.until(lambda: session.asked)
            world.commit(TRAIN)
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
        assert world.counter() == (TRAIN if number == errno.EIO else "left")
        assert not refusals

    play(go())


def test_an_error_that_answers_nothing_keeps_the_result(world, caplog):
    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            session.answers[TRAIN] = [UnauthenticatedError("revoked")]
            await session.until(lambda: f"result {TRAIN}" in session.calls)
            await world.idle()
            assert world.entries == [TRAIN]
            session.offer()
            session.offer(TRAIN)
            await session.until(lambda: session.submitted)
            await world.idle()
            assert f"begin {TRAIN}" not in session.calls
        assert world.counter() == "left"

    with caplog.at_level(logging.WARNING):
        play(go())
    assert "not answered: revoked" in caplog.text


# ---- failures


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


def test_a_task_waits_for_a_run_that_comes_back(world):
    """After a restart, as long as its data is not mounted."""

    async def go():
        run = world.runs.pop(7)
        world.waiting[7] = asyncio.Event()
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)
            assert list(session.asked[1].held) == [TRAIN]
            world.runs[7] = run
            world.waiting[7].set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)

    play(go())


def test_an_unknown_run(world, caplog):
    failure = fails(world, pb.Task(id="9/1/train/site-1"))
    assert failure.error.startswith("this site does not have run 9")
    assert "run 9 is not here" in caplog.text


@pytest.mark.parametrize(
    ("step", "error", "traceback"),
    [
        (RunProcessCrashed("it crashed", "last words"), "it crashed", "last words"),
        (TaskFailure("ValueError: no", "line 3"), "ValueError: no", "line 3"),
        (
            JobCodeError(TaskFailure("no module", "import x")),
            "the job's code cannot be loaded: no module",
            "import x",
        ),
        (ResourceExhaustedError("too large"), "too large", ""),
        (OSError("disk full"), "disk full", ""),
        (MemoryError("secret"), "a defect of the site's program: MemoryError", ""),
    ],
)
def test_failures_are_reported(world, step, error, traceback):
    world.runs[7].does[TRAIN] = [step]
    failure = fails(world, pb.Task(id=TRAIN))
    assert (failure.error, failure.traceback) == (error, traceback)
    assert world.runs[7].phases[-1] == "idle"


@pytest.mark.parametrize("kind", [TRAIN, TRAIN.replace("train", "submit_model")])
def test_a_run_that_was_started_for_validation_takes_nothing_else(world, kind):
    world.runs[7].plan.purpose = "validate"
    failure = fails(world, pb.Task(id=kind))
    assert "started for validation: it takes no" in failure.error
    assert "signed purpose" in failure.error
    assert not any(call.startswith(("begin", "download")) for call in world.session.calls)


def test_a_model_that_may_not_be_downloaded(world):
    blob = world.model()
    world.session.uploads[blob.digest] = [NotFoundError("no such blob")]
    assert fails(world, pb.Task(id=TRAIN, model=blob)).error == "no such blob"


def test_not_a_number(world):
    world.runs[7].does[TRAIN] = [{"w": np.array([1, np.nan, 2, np.inf], np.float32)}]
    error = fails(world, pb.Task(id=TRAIN, model=world.model())).error
    assert "2 of 4 values are NaN or infinite" in error


def test_another_shape(world):
    world.runs[7].does[TRAIN] = [{"w": np.zeros(5, np.float32)}]
    assert "'w'" in fails(world, pb.Task(id=TRAIN, model=world.model())).error


def test_a_failure_that_is_refused_ends_the_task(world):
    async def go():
        async with world.loop() as session:
            world.runs[7].does[TRAIN] = [TaskFailure("no")]
            session.answers[TRAIN] = [FailedPreconditionError("not open")]
            session.offer(TRAIN)
            await session.until(lambda: f"failure {TRAIN}" in session.calls)
            await world.idle()
            assert session.submitted == []

    play(go())


# ---- the site's own filters


CLIP = Component(name="clip_norm", args={"max_norm": 1.0})


def sent(world, *tasks: pb.Task) -> list[pb.TaskOutcome]:
    """Return what is sent for tasks, one after the other."""

    async def go():
        async with world.loop() as session:
            for number, task in enumerate(tasks, start=1):
                session.offer(task)
                await session.until(lambda n=number: len(session.submitted) == n)
                await world.idle()
                if task is not tasks[-1]:
                    session.offer()
            return [request.result for request in session.submitted]

    return play(go())


@pytest.fixture
def keep(world, monkeypatch):
    """The arrays of every model that is uploaded."""
    kept = []

    async def send(channel, path, blob, transfer_id, *, token):
        kept.append(load_copy(path)["w"])
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(answering, "send_blob", send)
    return kept


def test_filters_and_the_cap_on_examples(world, keep):
    world.policy = SitePolicy(filters=(CLIP,), max_examples=10)
    train = pb.Task(id=TRAIN, model=world.model(1.0))
    results = sent(world, train, pb.Task(id=SUBMIT), pb.Task(id=VALIDATE, model=world.model(9.0)))
    assert [result.examples for result in results] == [10, 10, 100]
    assert [result.received_examples for result in results] == [90, 90, 90]
    # Trained is 3, received was 1: a change of norm 4, of which 1 may leave.
    for arrays in keep:
        np.testing.assert_allclose(arrays, 1.5, rtol=1e-6)
    assert len(keep) == 2
    assert results[0].blob == results[1].blob


def wired(world, value: float, name: str) -> tuple[pb.Blob, pb.Blob]:
    """Return a model and what sites download of it instead."""
    model = world.model(value)
    blobs = FileBlobStore(world.folder / "server")
    ref = blobs.create(lambda path: path.write_bytes(world.source[model.digest]))
    wire = make_wire(blobs, ref, name)
    world.source[wire.digest] = blobs.path(wire.digest).read_bytes()
    return model, pb.Blob(digest=wire.digest, size=wire.size)


@pytest.mark.parametrize("name", ["bf16", "fp16+zstd", "zstd"])
def test_a_model_is_downloaded_as_the_task_says(world, name):
    model, wire = wired(world, 1.0, name)
    bases = []

    async def look():
        bases.append(load_copy(world.runs[7].models[-1])["w"].tolist())

    world.runs[7].does[TRAIN] = [look]
    world.runs[7].does[NEXT] = [look]
    world.runs[7].job.codec_down = name
    tasks = [pb.Task(id=each, model=model, wire=wire, wire_codec=name) for each in (TRAIN, NEXT)]
    results = sent(world, *tasks)
    assert bases == [[1.0] * 4] * 2
    assert [result.trained_from for result in results] == [model.digest] * 2
    downloads = [call for call in world.session.calls if call.startswith("download")]
    assert downloads == [f"download {wire.digest[-4:]}"], "once, and not the model itself"


def test_an_update_is_sent_as_the_task_says(world, monkeypatch):
    kept = []

    async def send(channel, path, blob, transfer_id, *, token):
        kept.append(load_copy(path))
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(answering, "send_blob", send)
    world.runs[7].job.codec = "bf16"
    sent(world, pb.Task(id=TRAIN, model=world.model(1.0), codec="bf16"))
    assert [list(arrays) for arrays in kept] == [["h/w"]]
    np.testing.assert_array_equal(kept[0]["h/w"].astype("f4"), 2)  # trained is 3, received was 1


def test_a_change_that_the_codec_cannot_say_is_a_failure(world):
    world.runs[7].does[TRAIN] = [{"w": np.full(4, 1e6, np.float32)}]
    world.runs[7].job.codec = "fp16"
    error = fails(world, pb.Task(id=TRAIN, model=world.model(1.0), codec="fp16")).error
    assert "model['w']: codec fp16: a value is beyond float16; choose codec" in error


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"id": TRAIN, "codec": "none"}, "codec"),  # exact, where less was signed
        ({"id": TRAIN, "codec": "fp16"}, "codec"),
        ({"id": VALIDATE, "codec": "int8"}, "codec"),
        ({"id": TRAIN, "codec": "int8", "wire_codec": "zstd"}, "codec_down"),
    ],
)
def test_a_form_that_was_not_signed_is_refused(world, asked, field):
    world.runs[7].job.codec = "int8"
    world.runs[7].job.codec_down = "bf16"
    error = fails(world, pb.Task(model=world.model(1.0), **asked)).error
    assert error.startswith(f"the server asks for {field} ")
    assert "download" not in " ".join(world.session.calls)


def test_without_filters_the_bytes_stay(world, keep):
    (result,) = sent(world, pb.Task(id=TRAIN, model=world.model(1.0)))
    np.testing.assert_array_equal(keep[0], 3)
    assert result.examples == 100


def test_validation_does_not_move_the_base_of_filters(world, keep):
    world.policy = SitePolicy(filters=(CLIP,))
    train = pb.Task(id=TRAIN, model=world.model(1.0))
    other = pb.Task(id="7/1/validate.global/site-1", model=world.model(50.0))
    sent(world, train, other, pb.Task(id=SUBMIT))
    np.testing.assert_allclose(keep[1], 1.5, rtol=1e-6)


def test_filters_need_something_to_compare_with(world):
    world.policy = SitePolicy(filters=(CLIP,))
    assert "(rule: policy filters)" in fails(world, pb.Task(id=SUBMIT)).error


def test_what_filters_compare_with_outlives_the_site_and_its_cache(world, keep):
    """A site that was killed after its last training still submits its best model."""
    world.policy = SitePolicy(filters=(CLIP,))
    sent(world, pb.Task(id=TRAIN, model=world.model(1.0)))
    for digest in world.blobs.digests():
        world.blobs.delete(digest)
    world.session = FakeSession(world.blobs, world.source)
    world.runs[7] = FakeRun(world.session, world.folder / "run-7", 7)
    sent(world, pb.Task(id=SUBMIT))
    np.testing.assert_allclose(keep[1], 1.5, rtol=1e-6)


def test_an_unknown_filter_is_a_failure(world):
    world.policy = SitePolicy(filters=(Component(name="blur"),))
    assert "blur" in fails(world, pb.Task(id=TRAIN, model=world.model())).error


# ---- ends


def test_the_end_of_a_run(world):
    async def go():
        world.commit(TRAIN)
        async with world.loop() as session:
            session.answers[TRAIN] = [asyncio.Event()]
            world.runs[8].does[OTHER] = [asyncio.Event()]
            session.offer(TRAIN, NEXT, OTHER)
            await session.until(lambda: f"begin {OTHER}" in session.calls)
            session.offer(OTHER, ended=[7])
            await session.until(lambda: len(session.asked) == 3)
            assert world.ended == [(7, "finished")]
            assert list(session.asked[2].held) == [OTHER]
            assert list(session.asked[2].runs) == [8]
        assert world.entries == []
        assert f"begin {NEXT}" not in session.calls

    play(go())


def test_cancelled_while_it_is_spooled(world, monkeypatch):
    """The thread that spools cannot be stopped: it is waited for, and its entry is whole."""

    async def go():
        loop, commits = asyncio.get_running_loop(), asyncio.Event()
        gate = threading.Event()

        def commit(self, entry, work):
            loop.call_soon_threadsafe(commits.set)
            assert gate.wait(60)
            real(self, entry, work)

        real = Spool.commit
        monkeypatch.setattr(Spool, "commit", commit)
        async with world.loop() as session:
            session.offer(TRAIN)
            await commits.wait()
            worker = world.tasks._workers[TRAIN]
            worker.cancel()
            await settle()
            assert not worker.done()
            gate.set()
            await asyncio.wait([worker])
            assert worker.cancelled()
        assert world.entries == [TRAIN]
        assert list((world.folder / "work").iterdir()) == []

    play(go())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_state_that_cannot_be_settled_is_settled_before_the_next_task(world, monkeypatch, number):
    """Else the next task would be trained from the state before, without a word."""
    real, refusals = Spool.settle, [OSError(number, os.strerror(number))] * 2

    def settle(self, task_id, state):
        assert str(task_id) == NEXT or f"begin {NEXT}" not in world.session.calls
        if refusals:
            raise refusals.pop()
        real(self, task_id, state)

    async def go():
        monkeypatch.setattr(Spool, "settle", settle)
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            session.offer(NEXT)
            await session.until(lambda: f"took {NEXT}" in session.calls)
            await world.idle()
        assert not refusals
        assert (current_state(world.runs[7].state) / "counter").read_text() == NEXT

    play(go())


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_a_result_that_cannot_be_spooled_now_is_spooled_later(world, monkeypatch, step):
    """What was trained is not trained again, and its filters do not run on their own output."""

    def refuse(*args):
        if refusals:
            raise refusals.pop()
        return real(*args)

    where = module if step == "prepare" else Spool
    real, refusals = getattr(where, step), [OSError(errno.ENOSPC, "full")] * 2

    async def go():
        monkeypatch.setattr(where, step, refuse)
        async with world.loop() as session:
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.submitted[0].HasField("result")
        assert not refusals

    play(go())


class ShortOfThreads:
    """`asyncio.to_thread` that starts no thread for its k-th call, and for no other.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, monkeypatch, refused):
        self.calls, self._refused, self._real = 0, refused, asyncio.to_thread
        monkeypatch.setattr(asyncio, "to_thread", self)

    async def __call__(self, work, *args, **kwargs):
        self.calls += 1
        if self.calls == self._refused:
            raise RuntimeError("can't start new thread")
        return await self._real(work, *args, **kwargs)


def test_no_thread_at_whichever_step_changes_nothing(tmp_path, world, monkeypatch):
    """What is spooled is sent, whatever comes after it; and no task fails before it was tried."""

    async def go(each, threads):
        async with each.loop() as session:
            session.offer(pb.Task(id=TRAIN, seed=3, model=each.model()))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await each.idle()
            assert session.submitted[0].HasField("result"), session.submitted
            assert session.calls.count(f"begin {TRAIN}") == 1
        assert each.counter() == TRAIN
        assert each.entries == []
        return threads.calls

    for refused in range(1, 100):
        (tmp_path / str(refused)).mkdir()
        with monkeypatch.context() as patch:
            threads = ShortOfThreads(patch, refused)
            if play(go(World(tmp_path / str(refused)), threads)) < refused:
                break
    assert refused > 8


@pytest.mark.parametrize("name", ["get", "entries"])
def test_the_loop_goes_on_while_the_spool_is_asked(world, monkeypatch, name):
    """It may have to wait: for the disk, or for another run's result to be renamed."""
    going_on, real = threading.Event(), getattr(Spool, name)

    def slowly(*args):
        assert going_on.wait(60), "the event loop stands still"
        return real(*args)

    async def go():
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def ask(*args):
            loop.call_soon_threadsafe(asked.set)
            return slowly(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Spool, name, ask)
            async with world.loop() as session:
                session.offer(TRAIN)
                await asked.wait()
                going_on.set()
                await session.until(lambda: f"took {TRAIN}" in session.calls)
                assert session.submitted[0].HasField("result")

    play(go())


def test_a_run_that_waits_for_space_has_what_nobody_needs(world):
    """Its task is in hand, and again and again the disk has no room for it."""

    async def go():
        old = world.blobs.create(lambda path: path.write_bytes(b"of a round before") and None)
        async with world.loop() as session:
            gate = asyncio.Event()
            world.runs[7].does[TRAIN] = [gate]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 2)
            assert world.blobs.has(old.digest)
            world.runs[7].troubles.short_of_space = True
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 3)
            assert not world.blobs.has(old.digest)
            gate.set()
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert not world.runs[7].troubles.short_of_space

    play(go())


def test_a_result_that_finds_no_space_has_that_of_what_nobody_needs(world, monkeypatch):
    refusals, real = [OSError(errno.ENOSPC, "full")], module.prepare

    def refuse(*args):
        if refusals:
            raise refusals.pop()
        assert not world.blobs.has(old.digest)
        return real(*args)

    async def go():
        monkeypatch.setattr(module, "prepare", refuse)
        async with world.loop() as session:
            session.offer(pb.Task(id=TRAIN, model=world.model()))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].HasField("result")

    old = world.blobs.create(lambda path: path.write_bytes(b"of a round before") and None)
    play(go())
    assert not refusals


def test_a_run_that_is_taken_on_is_asked_about_at_once(world):
    """It may have been ended while the site took it on: the call that waits does not name it."""

    async def go():
        async with world.loop() as session:
            await session.until(lambda: len(session.asked) == 1)
            world.runs[9] = FakeRun(session, world.folder / "new", 9)
            world.news.set()
            await session.until(lambda: len(session.asked) == 2)
            assert list(session.asked[1].runs) == [7, 8, 9]

    play(go())


@pytest.mark.parametrize("error", [RuntimeError("odd"), DeadlineExceededError("odd")])
def test_a_task_that_ends_unanswered_is_given_back_at_once(world, error):
    """The server believes that it is in hand: the call that waits would do so for a minute."""

    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [error]
            session.offer(TRAIN)
            await session.until(lambda: [list(ask.held) for ask in session.asked[1:]][1:] == [[]])
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


@pytest.mark.parametrize("where", ["uploads", "answers"])
def test_what_a_disabled_site_has_trained_is_kept_until_it_is_enabled(world, where):
    async def go():
        async with world.loop() as session:
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            getattr(session, where)[TRAIN] = [refused, refused]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 1
            assert session.submitted[0].HasField("result")
        assert world.counter() == TRAIN

    play(go())


def test_a_failure_of_a_disabled_site_is_told_once_it_is_enabled(world):
    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [PermissionDeniedError("is disabled", rule="disabled")]
            world.runs[7].does[TRAIN] = [TaskFailure("after hours")]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].failure.error == "after hours"
            assert session.calls.count(f"begin {TRAIN}") == 1

    play(go())


def test_a_disabled_site_fetches_the_package_of_a_run_once_it_is_enabled(world):
    """Until then the others do not wait for its answer to the start."""

    async def go():
        async with world.loop() as session:
            model = world.model()
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            session.uploads[model.digest] = [refused, refused]
            path = await world.tasks.fetch(ModelRef(model.digest, model.size))
            assert path.exists()

    play(go())


def test_a_disabled_site_downloads_once_it_is_enabled(world):
    async def go():
        async with world.loop() as session:
            model = world.model()
            refused = PermissionDeniedError("site-1 is disabled", rule="disabled")
            session.uploads[model.digest] = [refused]
            session.offer(pb.Task(id=TRAIN, model=model))
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            assert session.submitted[0].HasField("result")

    play(go())


def test_a_task_whose_result_was_lost_is_given_back_at_once(world):
    async def go():
        async with world.loop() as session:
            session.uploads[TRAIN] = [lambda: world.spool.file(TaskId.parse(TRAIN)).unlink()]
            session.answers[TRAIN] = [DataLossError("its bytes are not what they were")]
            session.offer(TRAIN)
            await session.until(lambda: len(session.asked) == 3)
            assert [list(ask.held) for ask in session.asked] == [[], [TRAIN], []]
            session.offer(TRAIN)
            await session.until(lambda: f"took {TRAIN}" in session.calls)
            await world.idle()
            assert session.calls.count(f"begin {TRAIN}") == 2

    play(go())


def test_what_the_server_has_lost_is_told_and_not_trained_again(world):
    """Its base is damaged there: the same result would come to the same end, for ever."""

    async def go():
        async with world.loop() as session:
            session.answers[TRAIN] = [DataLossError("blob x is damaged")]
            session.offer(TRAIN)
            await session.until(lambda: len(session.submitted) == 1)
            await world.idle()
            assert "blob x is damaged" in session.submitted[0].failure.error
            assert world.entries == []

    play(go())


# ---- downloads


def test_one_download_however_many_ask(world):
    async def go():
        async with world.loop() as session:
            blob = world.model()
            ref = ModelRef(blob.digest, blob.size)
            found = await asyncio.gather(*(world.tasks.fetch(ref) for _ in range(5)))
            assert len(set(found)) == 1
            assert session.calls == [f"download {ref.digest[-4:]}"]
            assert len(world.tasks._cache._fetching) == 0

    play(go())


def test_downloads_of_one_blob_never_overlap(world):
    """Also if the first is given up while others wait, and more come."""

    async def go():
        async with world.loop() as session:
            blob = world.model()
            ref = ModelRef(blob.digest, blob.size)
            first_gate, second_gate = asyncio.Event(), asyncio.Event()
            session.uploads[blob.digest] = [first_gate, second_gate]
            first, second = (asyncio.create_task(world.tasks.fetch(ref)) for _ in range(2))
            await session.until(lambda: len(session.calls) == 1)
            await settle()
            first.cancel()
            third = asyncio.create_task(world.tasks.fetch(ref))
            await session.until(lambda: len(session.calls) == 2)
            await settle()
            second_gate.set()
            assert await second == await third
            assert len(session.calls) == 2

    play(go())


def test_a_run_that_was_started_anew_meanwhile_goes_on(world):
    """The server ended it for this site, and then had the site join again by another order."""

    async def go():
        async with world.loop() as session:
            await session.until(lambda: len(session.asked) == 1)
            world.runs[7] = FakeRun(session, world.folder / "anew", 7)
            session.offer(ended=[7, 8])
            await session.until(lambda: len(session.asked) == 2)
            assert world.ended == [(8, "finished")]
            session.offer(ended=[7])
            await session.until(lambda: len(session.asked) == 3)
            assert [run for run, _ in world.ended] == [8, 7]

    play(go())
