import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flplatform.algorithms.workflows import RunState
from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError, NotFoundError
from flplatform.core.ports import Row
from flplatform.core.workflow import Abort
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.ledger import RunSummary
from flplatform.server.past_runs import RECENT_RUNS, RECENT_STATES, Kept, PastRuns
from flplatform.server.run_actor import RunActor
from tests.support.stores import MemoryStateStore
from tests.unit.server.scene import DEADLINE_S, Scene, play, refused, settle, until


class Logs:
    """Logs of runs that all had targets a and b, on a disk that can be held."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.failure: Exception | None = None
        self.at_once = self.most_at_once = 0
        self.free = threading.Event()
        self.free.set()
        self.past = PastRuns(
            lambda run: cast(RunActor, self.load(run)), lambda run: cast(RunState, self.load(run))
        )

    def load(self, run: int) -> object:
        self.read.append(run)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            assert self.free.wait(DEADLINE_S)
            if self.failure is not None:
                raise self.failure
        finally:
            self.at_once -= 1
        return SimpleNamespace(run=run, targets=("a", "b"))

    @property
    def whole(self) -> Kept[RunActor]:
        return self.past.whole

    def asked_by(self, site: str, run: int) -> Coroutine[Any, Any, RunState]:
        summary = RunSummary(run, "job", "lead", "id", "then", status="finished", reason="done")
        return self.past.state_for(site, summary)


def test_a_log_is_read_once_for_all_who_ask_and_nobody_else_waits() -> None:
    async def it() -> None:
        logs = Logs()
        logs.free.clear()
        asking = [asyncio.create_task(logs.whole.read(1)) for _ in range(5)]
        await until(lambda: logs.read)
        await settle()  # the loop goes on
        logs.free.set()
        assert len({id(each) for each in await asyncio.gather(*asking)}) == 1
        assert logs.whole.get(1) is await logs.whole.read(1)
        assert logs.read == [1]
        assert not logs.whole._turns

    play(it())


def test_who_leaves_does_not_have_it_read_again_meanwhile() -> None:
    async def it() -> None:
        logs = Logs()
        logs.free.clear()
        asking = [asyncio.create_task(logs.whole.read(1)) for _ in range(3)]
        await until(lambda: logs.read)
        for each in asking[:2]:
            each.cancel()
        await settle()
        assert logs.read == [1]
        logs.free.set()
        assert (await asking[2]).run == 1
        assert logs.most_at_once == 1

    play(it())


def test_those_looked_at_last_are_kept() -> None:
    async def it() -> None:
        logs = Logs()
        for run in range(RECENT_RUNS):
            await logs.whole.read(run)
        await logs.whole.read(0)  # makes it young
        await logs.whole.read(100)
        assert logs.whole.get(0).run == 0
        assert logs.read == [*range(RECENT_RUNS), 100]
        logs.whole.get(1)
        assert logs.read[-1] == 1, "the oldest one had gone"
        assert len(logs.whole) == RECENT_RUNS

    play(it())


def test_a_log_that_cannot_be_read_is_tried_again() -> None:
    async def it() -> None:
        logs = Logs()
        logs.failure = NotFoundError("gone")
        assert await refused(logs.whole.read(1)) is logs.failure
        assert await refused(logs.asked_by("a", 1)) is logs.failure
        logs.failure = None
        assert (await logs.whole.read(1)).run == (await logs.asked_by("a", 1)).run == 1

    play(it())


def test_a_site_that_was_no_target_has_nothing_read_twice() -> None:
    async def it() -> None:
        logs, runs = Logs(), range(2 * RECENT_STATES)
        for run in runs:  # whom it was meant for, only its log tells
            await logs.asked_by("c", run)
        for run in runs:
            error = await refused(logs.asked_by("c", run))
            assert type(error) is FailedPreconditionError
            assert (error.message, error.rule) == (f"run {run} is finished: done", "run_ended")
        assert logs.read == [*runs]
        assert (await logs.asked_by("a", 0)).run == 0

    play(it())


def test_one_log_at_a_time_is_read_for_sites_and_operators_do_not_wait_for_them() -> None:
    async def it() -> None:
        logs = Logs()
        logs.free.clear()
        asking = [asyncio.create_task(logs.asked_by("a", run)) for run in range(4)]
        await until(lambda: logs.read)
        await settle()
        assert logs.read == [0]
        operator = asyncio.create_task(logs.whole.read(9))
        await until(lambda: 9 in logs.read)
        assert logs.read == [0, 9]
        logs.free.set()
        assert [each.run for each in await asyncio.gather(*asking)] == [0, 1, 2, 3]
        assert (await operator).run == 9
        assert logs.most_at_once == 2

    play(it())


# ---- in their surroundings ----------------------------------------------------------------------


class SlowToRead(MemoryStateStore):
    """A database that answers no question about a run for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()
        self.asked = 0

    def read(self, stream: str, after: int = 0) -> list[Row]:
        if stream.startswith("run/"):
            self.asked += 1
            assert self.free.wait(DEADLINE_S / 2), "the event loop waits for the database"
        return super().read(stream, after)


def failed(run: int, site: str) -> pb.SubmitResultRequest:
    return pb.SubmitResultRequest(
        task_id=f"{run}/1/train/{site}", failure=pb.TaskFailure(error="x")
    )


@pytest.mark.parametrize("kind", ["failure", "result"])
def test_what_sites_say_of_ended_runs_holds_up_nobody(scene: Scene, kind: str) -> None:
    store = scene.store = SlowToRead()
    scene.boot()

    async def it() -> None:
        scene.obeying("a", "b")
        for run in (1, 2):
            await scene.submit(rounds=1)
            task = await scene.offered("a")
            await scene.actor(run).tell(Abort("x"))
            await scene.ended(run)
        store.free.clear()
        request = failed(1, "a")
        if kind == "result":
            model = scene.model()
            given = pb.TaskOutcome(
                blob=pb.Blob(digest=model.digest, size=model.size),
                examples=1,
                trained_from=task.model.digest if task.model else "",
            )
            request = pb.SubmitResultRequest(task_id=request.task_id, result=given)
        telling = asyncio.create_task(scene.training.submit_result("a", request))
        await until(lambda: store.asked)
        await scene.submit(rounds=1)  # others go on
        await scene.offered("b")
        assert not telling.done()
        store.free.set()
        assert (await refused(telling)).rule == "run_ended"
        await scene.close()

    play(it())


def test_what_comes_late_counts_once_and_what_would_change_a_log_is_refused(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=1)
        a, b = [await scene.offered(site) for site in "ab"]
        assert await scene.training.submit_result("a", scene.result(a, 1.0)) == "accepted"
        at_work = scene.actor().state
        await scene.actor().tell(Abort("x"))
        await scene.ended()
        assert await scene.training.submit_result("a", scene.result(a, 1.0)) == "duplicate"
        late = scene.training.submit_result("b", scene.result(b))
        assert (await refused(late)).rule == "run_ended"
        scene.runs._past._states._keep(1, at_work)  # as a log without its end would have it
        error = await refused(scene.training.submit_result("b", failed(1, "b")))
        assert error.message == "run 1 is not at work"
        await scene.close()

    play(it())


def test_a_site_learns_of_an_ended_run_that_it_has_no_part_in_without_its_log(
    scene: Scene,
) -> None:
    store = scene.store = SlowToRead()
    scene.boot()

    async def it() -> None:
        scene.live("c")
        await scene.submit()
        await scene.actor().tell(Abort("x", "wrong data"))
        await scene.ended()
        asked = store.asked
        error = await refused(scene.training.submit_result("c", failed(1, "c")))
        assert (str(error), error.rule) == (
            "run 1 is aborted: wrong data (rule: run_ended)",
            "run_ended",
        )
        assert store.asked == asked
        assert (
            await refused(scene.training.submit_result("c", failed(7, "c")))
        ).code == "not_found"
        await until(lambda: scene.store.read(ev.FEDERATION)[-1].type == "RunSummarised")
        await scene.restart()
        asked = store.asked
        for _ in range(3):
            again = await refused(scene.training.submit_result("c", failed(1, "c")))
            assert (str(again), again.rule) == (str(error), error.rule)
        assert store.asked == asked + 1, "once, to learn whom it was meant for"
        await scene.close()

    play(it())
