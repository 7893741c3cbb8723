import asyncio
import contextlib
import errno
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from flplatform.algorithms.workflows import pending
from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef, Task, TaskFailure, TaskResult
from flplatform.core.model import Manifest
from flplatform.core.ports import Row
from flplatform.core.workflow import (
    Abort,
    AddTargets,
    Aggregate,
    Aggregated,
    Deploy,
    FailureArrived,
    Offer,
    ResultArrived,
    Roster,
    RosterChanged,
    SetQuorum,
    TimerFired,
    Wake,
    Withdraw,
)
from flplatform.server import run_actor
from flplatform.server.relay import Reply
from flplatform.server.run_actor import RunActor
from tests.support.stores import MemoryStateStore
from tests.support.workflows import RUN, blob, digest, job, run_opened
from tests.unit.server.scene import GatedStore, play, refused, settle, until

SITES = ("a", "b")


class Hands:
    """Everything around a run, played by hand.

    Attributes:
        aggregating: aggregations under way; `model_of` gives their results.
        trouble: raised, one after the other, by the next aggregations.
        seen: which sites each decision took to be there.
        still_s: for how long the server has stood still.
    """

    still_s = 0.0

    def __init__(self, *live: str) -> None:
        self.live = frozenset(live or SITES)
        self.deploys: dict[str, asyncio.Future[Reply]] = {}
        self.orders: list[tuple[str, str]] = []
        self.aggregating: list[int] = []
        self.changed: list[set[str]] = []
        self.heard: list[ev.Event] = []
        self.batches: list[int] = []
        self.trouble: list[Exception] = []
        self.seen: list[frozenset[str]] = []
        self.held: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    def roster(self) -> Roster:
        self.seen.append(self.live)
        return Roster(self.live)

    def stood_still_s(self) -> float:
        return self.still_s

    def deploy(self, item: Deploy, opened: ev.RunOpened) -> "asyncio.Future[Reply]":
        site = item.site
        self.orders.append((site, item.order))
        assert site not in self.deploys or self.deploys[site].done()
        self.deploys[site] = asyncio.get_running_loop().create_future()
        return self.deploys[site]

    @contextlib.asynccontextmanager
    async def make(self, closed: ev.RoundClosed, codec_down: str) -> AsyncIterator[Aggregated]:
        self.aggregating.append(closed.round)
        await self.gate.wait()
        if self.trouble:
            raise self.trouble.pop(0)
        made = model_of(closed)
        with self.hold(made.digest):
            yield Aggregated(closed.round, made)

    @contextlib.contextmanager
    def hold(self, *digests: str) -> Iterator[None]:
        self.held.update(digests)
        yield
        self.held.subtract(digests)

    def tasks_changed(self, sites: set[str]) -> None:
        self.changed.append(sites)

    def appended(self, actor: RunActor, events: Sequence[ev.Event]) -> None:
        assert actor.events[-len(events) :] == list(events)
        self.heard += events
        self.batches.append(len(actor.events))

    def accept(self, *sites: str) -> None:
        for site in sites or tuple(self.deploys):
            if not self.deploys[site].done():
                self.deploys[site].set_result(Reply("ok", {"isolation": "sandbox"}))


def model_of(closed: ev.RoundClosed) -> ModelRef:
    return ModelRef(digest(closed.model_dump_json()), 100)


def begin(hands: Hands, store: MemoryStateStore | None = None, **fields: Any) -> RunActor:
    """Open a run in an empty store."""
    store = store or MemoryStateStore()
    fields = {"wait_after_min_s": 600.0} | fields
    opened = run_opened(SITES, job(**fields))
    row = Row(ev.run_stream(RUN), 1, "2026-01-01T00:00:00Z", *ev.encode(opened))
    MemoryStateStore.append(store, [row])
    return resume(hands, store)


def resume(hands: Hands, store: MemoryStateStore) -> RunActor:
    actor = RunActor(store.read(ev.run_stream(RUN)), Manifest(()), store, hands)
    actor.start()
    return actor


async def training(hands: Hands, store: MemoryStateStore | None = None, **fields: Any) -> RunActor:
    """Open a run that all sites accept; round 1 is open."""
    actor = begin(hands, store, **fields)
    await settle()
    hands.accept()
    await until(lambda: actor.tasks)
    return actor


def answer(task: Task) -> ResultArrived:
    """What a site answers to a task; the same task, the same answer."""
    if task.id.owner:
        return ResultArrived(task.id, TaskResult(None, 10, {"accuracy": 0.5}))
    base = task.model.digest if task.model else ""
    result = TaskResult(blob(f"result of {task.id}"), 10, {}, {"accuracy": 0.4}, 10, base)
    return ResultArrived(task.id, result)


def open_tasks(actor: RunActor) -> list[Task]:
    return [task for tasks in actor.tasks.values() for task in tasks.values()]


async def finish(actor: RunActor, hands: Hands) -> None:
    """Play sites that do at once what they are asked."""
    while not actor.state.ended:
        hands.accept()
        for task in open_tasks(actor):
            await actor.tell(answer(task))
            break
        await asyncio.sleep(0)


# ---- deciding -----------------------------------------------------------------------------------


def test_nothing_is_done_before_it_is_durable() -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        task = actor.tasks["a"][f"{RUN}/1/train/a"]
        store.gated = True
        changed, heard = list(hands.changed), len(hands.heard)
        telling = asyncio.create_task(actor.tell(answer(task)))
        await until(lambda: store.waiting)
        await settle()
        assert not telling.done()
        assert set(actor.tasks) == {"a", "b"}
        assert (hands.changed, len(hands.heard)) == (changed, heard)
        assert actor.state.open_round.accepted == {}
        store.let_go()
        (event,) = await telling
        assert isinstance(event, ev.UpdateAccepted)
        assert set(actor.tasks) == {"b"}
        assert hands.changed[-1] == {"a"}
        assert hands.heard[-1] == event
        await actor.stop()

    play(scene())


def test_what_waits_is_decided_together_and_in_order() -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        store.gated = True
        tasks = open_tasks(actor)
        telling = [asyncio.create_task(actor.tell(SetQuorum(1, "x")))]
        await until(lambda: store.waiting)
        for task in tasks:
            telling.append(asyncio.create_task(actor.tell(answer(task))))
        telling.append(asyncio.create_task(actor.tell(answer(tasks[0]))))
        await settle()
        before = len(store.appends)
        store.let_go()
        await until(lambda: store.waiting)
        assert len(store.appends) == before + 1
        store.let_go()
        first, second, third, again = await asyncio.gather(*telling)
        assert [type(event) for event in second] == [ev.UpdateAccepted]
        assert type(third[0]) is ev.UpdateAccepted
        assert type(third[1]) is ev.RoundClosed, "decided on the provisional state"
        assert again == (), "the same again is a duplicate"
        store.gated = False
        await actor.stop()

    play(scene())


def test_a_refused_input_leaves_no_trace_and_spares_its_neighbours() -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        a, b = open_tasks(actor)
        state, appends = actor.state, len(store.appends)
        other = ResultArrived(a.id, TaskResult(blob("x"), 10, trained_from="wrong"))
        bad, good = await asyncio.gather(
            actor.tell(other), actor.tell(answer(b)), return_exceptions=True
        )
        assert isinstance(bad, FailedPreconditionError)
        assert isinstance(good[0], ev.UpdateAccepted)
        assert len(store.appends) == appends + 1
        assert actor.state.open_round.accepted.keys() == {"b"}
        assert state.open_round.accepted == {}
        await actor.stop()

    play(scene())


def test_a_defect_met_by_one_input_stays_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decide = run_actor.decide

    def fragile(state: Any, given: Any, roster: Roster) -> Any:
        if isinstance(given, SetQuorum):
            raise ZeroDivisionError("a defect")
        return decide(state, given, roster)

    monkeypatch.setattr(run_actor, "decide", fragile)

    async def scene() -> None:
        actor = await training(Hands())
        a, _ = open_tasks(actor)
        bad, good = await asyncio.gather(
            actor.tell(SetQuorum(1, "x")), actor.tell(answer(a)), return_exceptions=True
        )
        assert isinstance(bad, ZeroDivisionError)
        assert isinstance(good[0], ev.UpdateAccepted)
        await actor.stop()

    with caplog.at_level(logging.CRITICAL):
        play(scene())


def test_without_space_the_input_is_refused_and_the_state_as_it_was() -> None:
    async def scene() -> None:
        hands, store = Hands(), MemoryStateStore()
        actor = await training(hands, store)
        a, b = open_tasks(actor)
        state, events, tasks = actor.state, list(actor.events), dict(actor.tasks)
        heard = len(hands.heard)
        store.full = True
        for given in (answer(a), answer(b), SetQuorum(1, "x"), Abort("x")):
            assert type(await refused(actor.tell(given))) is ResourceExhaustedError
        assert (actor.state, actor.events, actor.tasks) == (state, events, tasks)
        assert len(hands.heard) == heard
        assert not state.ended
        store.full = False
        assert isinstance((await actor.tell(answer(a)))[0], ev.UpdateAccepted)
        rows = store.read(ev.run_stream(RUN))
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
        await actor.stop()

    play(scene())


@pytest.mark.parametrize("error", [UnavailableError("failed"), AlreadyExistsError("seq")])
def test_any_other_failed_append_reaches_who_asked(
    error: FLError, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        a, _ = open_tasks(actor)
        state = actor.state
        store.error = error
        assert await refused(actor.tell(answer(a))) is error
        assert actor.state == state
        store.error = None
        await actor.tell(answer(a))
        await actor.stop()

    with caplog.at_level(logging.CRITICAL):
        play(scene())


def test_an_input_is_decided_although_its_sender_left() -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        a, _ = open_tasks(actor)
        store.gated = True
        telling = asyncio.create_task(actor.tell(answer(a)))
        await until(lambda: store.waiting)
        telling.cancel()
        await settle()
        store.let_go()
        await until(lambda: actor.state.open_round.accepted)
        await actor.stop()

    play(scene())


# ---- acting -------------------------------------------------------------------------------------


def test_the_start_is_carried_to_each_target_until_it_answers() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = begin(hands)
        await settle()
        assert set(hands.deploys) == {"a", "b"}
        hands.accept("a")
        await until(lambda: "a" in actor.state.answers)
        assert actor.state.answers["a"].isolation == "sandbox"
        assert not hands.deploys["b"].done()
        hands.deploys["b"].set_result(Reply("refused", {}, "not here", "policy submitters"))
        await until(lambda: actor.state.ended)
        assert actor.state.answers["b"].rule == "policy submitters"
        assert actor.state.status == "failed"
        await actor.stop()

    play(scene())


def test_the_end_takes_back_what_is_under_way() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = begin(hands)
        await settle()
        hands.accept("a")
        await until(lambda: actor.state.answers)
        await actor.tell(Abort("me"))
        await settle()
        assert hands.deploys["b"].cancelled()
        assert actor.wakes_at == {}
        assert hands.changed[-1] == {"a"}, "who has the run is told that it is over"
        assert type(await refused(actor.tell(Abort("me")))) is FailedPreconditionError
        await actor.stop()

    play(scene())


def test_a_closed_round_is_aggregated_once() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = await training(hands, rounds=2)
        hands.gate.clear()
        for task in open_tasks(actor):
            await actor.tell(answer(task))
        await until(lambda: hands.aggregating)
        await actor.tell(RosterChanged())
        await actor.tell(SetQuorum(1, "x"))
        await settle()
        assert hands.aggregating == [1]
        hands.gate.set()
        await until(lambda: actor.state.round == 2)
        closed = next(event for event in actor.events if isinstance(event, ev.RoundClosed))
        assert actor.state.models[1].digest == model_of(closed).digest
        await actor.stop()

    play(scene())


def test_a_refusal_waits_for_what_it_rests_on() -> None:
    """An abort that is then not stored must not have a site drop what it has trained."""

    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        (task, *_) = open_tasks(actor)
        store.gated = True
        quorum = asyncio.create_task(actor.tell(SetQuorum(1, "lead")))
        await until(lambda: store.waiting)
        abort = asyncio.create_task(actor.tell(Abort("lead")))
        await settle()
        result = asyncio.create_task(actor.tell(answer(task)))
        await settle()
        store.let_go()
        await until(lambda: store.waiting)
        await settle()
        assert not result.done()
        _, appending = store.waiting.pop()
        appending.set_exception(ResourceExhaustedError("no space left", rule="disk"))
        assert await quorum
        for told in (abort, result):
            assert type(await refused(told)) is ResourceExhaustedError
        store.gated = False
        assert await actor.tell(answer(task))
        assert type(await refused(actor.tell(SetQuorum(0, "lead")))) is InvalidArgumentError
        await actor.stop()

    play(scene())


@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_told_is_kept_until_it_is_in_the_log(leaves: bool) -> None:
    """Also if who told it has left by then."""

    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        (task, *_) = open_tasks(actor)
        given = answer(task)
        assert given.result.blob is not None
        store.gated = True
        telling = asyncio.create_task(actor.tell(given))
        await until(lambda: store.waiting)
        if leaves:
            telling.cancel()
            await settle()
        assert hands.held[given.result.blob.digest] == 1
        store.gated = False
        store.let_go()
        await until(lambda: not +hands.held)
        assert any(isinstance(event, ev.UpdateAccepted) for event in actor.events)
        await actor.stop()

    play(scene())


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("the update cannot be read: Input/output error"),
        DataLossError("its bytes are others"),
    ],
)
def test_an_update_that_cannot_be_read_now_is_read_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(run_actor, "RETRY_S", 0.01)
    monkeypatch.setattr(run_actor, "LOST_RETRY_S", 0.01)

    async def scene() -> None:
        hands = Hands()
        hands.trouble = [error]
        actor = await training(hands)
        await finish(actor, hands)
        assert actor.state.status == "finished"
        assert actor.troubles == {}
        await actor.stop()

    play(scene())


@pytest.mark.parametrize("error", [InvalidArgumentError("krum needs 5"), ValueError("a defect")])
def test_an_aggregation_that_cannot_work_ends_the_run(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it is: else the run would wait for ever."""

    async def scene() -> None:
        hands = Hands()
        hands.trouble = [error]
        actor = await training(hands)
        await finish(actor, hands)
        assert actor.state.status == "failed"
        assert str(error) in actor.state.ended.reason
        await actor.stop()

    with caplog.at_level(logging.CRITICAL):
        play(scene())


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhaustedError("the disk is full"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EROFS, "Read-only file system"),
        MemoryError(),
    ],
)
def test_an_aggregation_that_the_machine_prevents_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(run_actor, "RETRY_S", 0.001)

    async def scene() -> None:
        hands = Hands()
        hands.trouble = [error] * 3
        actor = await training(hands)
        await finish(actor, hands)
        assert hands.aggregating == [1, 1, 1, 1]
        assert actor.state.status == "finished"
        await actor.stop()

    play(scene())


def test_what_the_run_must_learn_is_told_again_once_there_is_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_actor, "RETRY_S", 0.001)

    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = begin(hands, store)
        await settle()
        store.full = True
        hands.accept()
        await until(lambda: len(store.appends) > 3)
        assert actor.state.answers == {}
        store.full = False
        await until(lambda: actor.tasks)
        await actor.stop()

    play(scene())


async def without_b(hands: Hands, store: GatedStore) -> RunActor:
    """A run of two sites whose first round is over, and which waits for the return of one."""
    actor = await training(hands, store, rounds=3)
    hands.live = frozenset("a")
    for task in open_tasks(actor):
        await actor.tell(answer(task))
    await until(lambda: 1 in actor.state.models)
    assert not actor.tasks
    return actor


def test_a_site_that_comes_back_while_the_disk_is_full_is_noticed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_actor, "RETRY_S", 0.001)

    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await without_b(hands, store)
        store.full, before = True, len(store.appends)
        hands.live = frozenset("ab")
        actor.reconsider()
        await until(lambda: len(store.appends) > before + 3)
        assert not actor.tasks
        store.full = False
        await until(lambda: actor.tasks)
        assert actor.state.round == 2
        await actor.stop()

    play(scene())


@pytest.mark.parametrize("moment", ["while it is appended", "at its very end"])
def test_who_goes_while_his_return_is_decided_is_missed(moment: str) -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await without_b(hands, store)

        def gone() -> None:
            hands.live = frozenset()
            hands.seen.clear()
            actor.reconsider()

        decide = actor._decide_anew

        async def decide_and_go() -> None:
            await decide()
            if not hands.seen or hands.seen[-1]:
                gone()

        hands.live = frozenset("ab")
        if moment == "at its very end":
            actor._decide_anew = decide_and_go
        else:
            store.gated = True
        actor.reconsider()
        if store.gated:
            await until(lambda: store.waiting)
            gone()
            store.gated = False
            store.let_go()
        await until(lambda: hands.seen and run_actor.ROSTER not in actor._jobs)
        assert (hands.seen[-1], actor.state.round) == (frozenset(), 2)
        await actor.stop()

    play(scene())


# ---- timers -------------------------------------------------------------------------------------


def test_timers_fire() -> None:
    async def scene() -> None:
        hands = Hands()
        patient = begin(Hands(), deploy_wait_s=60.0)
        await settle()
        assert 0 < patient.wakes_at["deploy"] - asyncio.get_running_loop().time() <= 60.0
        await patient.stop()
        actor = begin(hands, deploy_wait_s=0.02, min_clients=1, round_deadline_s=0.02)
        await until(lambda: "a" in hands.deploys)
        hands.accept("a")
        await until(lambda: actor.tasks)
        assert ev.DeployWaitOver() in actor.events
        await until(lambda: actor.state.ended)
        assert actor.state.status == "aborted", "nobody trained: extended once, then aborted"
        assert ev.DeadlineExtended(round=1) in actor.events
        assert actor.wakes_at == {}
        await actor.stop()

    play(scene())


def test_an_event_that_comes_first_stops_the_timer() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = await training(hands, min_clients=1)
        (a, b) = open_tasks(actor)
        await actor.tell(answer(a))
        assert any(wake.startswith("wait/1") for wake in actor.wakes_at)
        await actor.tell(answer(b))
        closed = next(event for event in hands.heard if isinstance(event, ev.RoundClosed))
        assert closed.reason == "all participants answered"
        assert not any(wake.startswith("wait/1") for wake in actor.wakes_at)
        await actor.stop()

    play(scene())


def test_a_timer_that_changes_nothing_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fired: list[str] = []

    def decide(_state: Any, given: Any, _roster: Roster) -> tuple[ev.Event, ...]:
        if isinstance(given, TimerFired):
            fired.append(given.id)
        return ()

    monkeypatch.setattr(run_actor, "pending", lambda _: (Wake("w", 0.002),))
    monkeypatch.setattr(run_actor, "decide", decide)

    async def scene() -> None:
        actor = begin(Hands())
        await until(lambda: len(fired) >= 3)
        assert set(fired) == {"w"}
        await actor.stop()
        count = len(fired)
        await asyncio.sleep(0.01)
        assert len(fired) == count

    play(scene())


def test_a_standstill_is_added_to_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it due meanwhile, then sites are heard first, or later."""
    fired: list[str] = []

    def decide(_state: Any, given: Any, _roster: Roster) -> tuple[ev.Event, ...]:
        if isinstance(given, TimerFired):
            fired.append(given.id)
        return ()

    monkeypatch.setattr(run_actor, "pending", lambda _: (Wake("w", 0.02),))
    monkeypatch.setattr(run_actor, "decide", decide)

    async def scene() -> None:
        hands = Hands()
        actor = begin(hands)
        due, now = actor.wakes_at["w"], asyncio.get_running_loop().time
        hands.still_s = 600.0
        await until(lambda: actor.wakes_at["w"] != due)
        assert actor.wakes_at["w"] == pytest.approx(due + 600.0, abs=0.1)
        assert not fired
        await actor.stop()

        actor = begin(hands)
        due = actor.wakes_at["w"]
        hands.still_s += 0.001  # as if all of it were before the timer was due
        await until(lambda: actor.wakes_at["w"] != due)
        assert actor.wakes_at["w"] - now() == pytest.approx(run_actor.CATCH_UP_S, abs=0.1)
        assert not fired
        await actor.stop()

        monkeypatch.setattr(run_actor, "CATCH_UP_S", 0.0)
        actor = begin(hands)
        hands.still_s += 0.05
        armed = now()
        await until(lambda: fired)
        assert now() - armed >= 0.05, "then it fires"
        await actor.stop()

    play(scene())


# ---- the end of a process -----------------------------------------------------------------------


def test_who_waits_when_deciding_ends_is_told_to_try_again() -> None:
    async def scene() -> None:
        hands, store = Hands(), GatedStore()
        actor = await training(hands, store)
        a, b = open_tasks(actor)
        store.gated = True
        telling = [asyncio.create_task(actor.tell(answer(task))) for task in (a, b)]
        await until(lambda: store.waiting)
        telling.append(asyncio.create_task(actor.tell(Abort("x"))))
        await settle()
        await actor.stop()
        for each in telling:
            assert type(await refused(each)) is UnavailableError
        assert type(await refused(actor.tell(Abort("x")))) is UnavailableError

    play(scene())


def test_stopping_twice_and_before_the_start() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = begin(hands)
        await actor.stop()
        await actor.stop()
        fresh = RunActor(actor._store.read(ev.run_stream(RUN)), Manifest(()), actor._store, hands)
        await fresh.stop()

    play(scene())


SCRIPT: dict[str, Any] = {
    "workflow": ["scatter_gather", "cross_site_validation"],
    "rounds": 2,
    "watch": {"metric": "accuracy"},
}


def pending_now(actor: RunActor, hands: Hands) -> tuple[Any, ...]:
    """What the actor has really in hand."""
    return (
        sorted(str(task.id) for task in open_tasks(actor)),
        sorted(hands.deploys),
        sorted(set(hands.aggregating)),
        sorted(actor.wakes_at),
    )


def wanted(actor: RunActor) -> tuple[Any, ...]:
    items = pending(actor.state)
    return (
        sorted(str(item.task.id) for item in items if isinstance(item, Offer)),
        sorted(item.site for item in items if isinstance(item, Deploy)),
        sorted(item.closed.round for item in items if isinstance(item, Aggregate)),
        sorted(item.id for item in items if isinstance(item, Wake)),
    )


def test_after_a_crash_at_any_event_the_run_goes_on_to_the_same_end() -> None:
    async def scene() -> None:
        hands, store = Hands(), MemoryStateStore()
        actor = begin(hands, store, **SCRIPT)
        await finish(actor, hands)
        await actor.stop()
        whole = store.read(ev.run_stream(RUN))
        assert actor.state.status == "finished"
        assert len(hands.batches) > 12
        for count in (1, *hands.batches):
            again, cut = Hands(), MemoryStateStore()
            again.gate.clear()
            cut.append(whole[:count])
            resumed = resume(again, cut)
            await settle()
            assert pending_now(resumed, again) == wanted(resumed)
            assert resumed.events == actor.events[:count]
            again.gate.set()
            await finish(resumed, again)
            assert resumed.state == actor.state
            assert sorted(map(repr, resumed.events)) == sorted(map(repr, actor.events))
            await resumed.stop()

    play(scene())


def test_results_repeated_after_a_crash_count_once() -> None:
    async def scene() -> None:
        hands, store = Hands(), MemoryStateStore()
        actor = await training(hands, store)
        a, b = open_tasks(actor)
        await actor.tell(answer(a))
        await actor.stop()
        resumed = resume(Hands(), store)
        assert set(resumed.tasks) == {"b"}
        assert await resumed.tell(answer(a)) == ()
        other = ResultArrived(a.id, TaskResult(blob("other bytes"), 10))
        assert type(await refused(resumed.tell(other))) is AlreadyExistsError
        failed = FailureArrived(a.id, TaskFailure("no"))
        assert type(await refused(resumed.tell(failed))) is AlreadyExistsError
        await resumed.tell(answer(b))
        closed = next(event for event in resumed.events if isinstance(event, ev.RoundClosed))
        assert [target.site for target in closed.contributions] == ["a", "b"]
        await resumed.stop()

    play(scene())


def test_a_site_that_joins_is_given_its_own_order() -> None:
    async def scene() -> None:
        hands = Hands()
        actor = begin(hands, min_clients=1)
        await settle()
        first = hands.deploys["b"]
        await actor.tell(Withdraw(("b",), "amy"))
        await settle()
        assert first.cancelled()
        await actor.tell(AddTargets(("b", "c"), "another", "amy"))
        await actor.tell(Withdraw(("b",), "amy"))
        await actor.tell(AddTargets(("b",), "another", "amy"))
        await settle()
        opened = actor.state.opened
        assert hands.orders == [
            ("a", opened.order),
            ("b", opened.order),
            ("b", "another"),
            ("c", "another"),
            ("b", "another"),
        ]
        hands.accept()
        await until(lambda: actor.state.deployed == {"a", "b", "c"})
        assert actor.events[-1].participants == ("a", "b")  # c is not live
        await actor.stop()

    play(scene())
