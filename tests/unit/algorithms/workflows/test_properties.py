"""What holds in every run, whatever comes in whatever order."""

import contextlib
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.core.events import (
    Event,
    GatherClosed,
    GatherOpened,
    ModelPublished,
    ModelScored,
    QuorumSet,
    ResultAccepted,
    RoundClosed,
    RoundOpened,
    RunEnded,
    RunOpened,
    SiteAnswered,
    SiteWithdrawn,
    TargetsAdded,
    TaskFailed,
    UpdateAccepted,
    encode,
)
from flplatform.core.messages import TaskFailure, TaskId, TaskResult
from flplatform.core.workflow import (
    AnswerArrived,
    FailureArrived,
    Input,
    ResultArrived,
    TimerFired,
    Wake,
)
from tests.support.workflows import (
    RUN,
    SOURCE,
    WATCH,
    Events,
    Played,
    blob,
    training,
    validating,
)

SITES = "abcd"
OWNERS = (*SITES, "global", "last")
KINDS = ("train", "submit_model", *(f"validate.{owner}" for owner in OWNERS))
WORKFLOWS = (
    ("scatter_gather",),
    ("scatter_gather", "cross_site_validation"),
    ("cross_site_validation", "scatter_gather"),
    ("cross_site_validation",),
)

# ---- the log, read by somebody who knows the rules but not the program --------------------------


class Reader:
    """Reads a run's log event by event and objects to what the rules forbid."""

    def __init__(self, opened: RunOpened) -> None:
        self.opened = opened
        self.quorum = opened.min_clients
        self.models = {0: opened.initial_model}
        self.targets = set(opened.sites)
        self.deployed: set[str] = set()
        self.settled: set[str] = set()
        self.scores: dict[int, float] = {}
        self.best: float | None = None
        self.round: RoundOpened | None = None
        self.updates: dict[str, UpdateAccepted] = {}
        self.failed: set[str] = set()
        self.closed: RoundClosed | None = None
        self.gather: GatherOpened | None = None
        self.cells: set[str] = set()
        self.ended: RunEnded | None = None

    def read(self, item: object) -> None:
        assert self.ended is None, "no event follows the terminal one"
        match item:
            case SiteAnswered():
                assert item.site in self.targets - self.deployed
                self.deployed |= {item.site} if item.accepted else set()
            case SiteWithdrawn():
                assert item.site in self.targets
                self.targets.remove(item.site)
                self.deployed.discard(item.site)
            case TargetsAdded():
                assert self.deployed.isdisjoint(item.sites)
                self.targets |= set(item.sites)
            case QuorumSet():
                self.quorum = item.min_clients
            case RoundOpened():
                self.open_round(item)
            case UpdateAccepted() | ResultAccepted() | TaskFailed():
                self.settle(item)
            case RoundClosed():
                self.close_round(item)
            case ModelPublished():
                self.publish(item)
            case ModelScored():
                self.score(item)
            case GatherOpened():
                assert self.gather is None
                assert self.round is None
                self.gather, self.cells = item, set()
            case GatherClosed():
                self.close_gather(item)
            case RunEnded():
                self.ended = item

    def open_round(self, opened: RoundOpened) -> None:
        assert self.round is None
        assert self.gather is None
        assert opened.round == max(self.models) + 1
        assert opened.model == self.models[opened.round - 1]
        assert list(opened.participants) == sorted(set(opened.participants) & self.deployed)
        assert len(opened.participants) >= self.quorum
        self.round, self.updates, self.failed = opened, {}, set()

    def settle(self, item: UpdateAccepted | ResultAccepted | TaskFailed) -> None:
        assert item.task_id not in self.settled, "at most one outcome per task"
        self.settled.add(item.task_id)
        task_id = TaskId.parse(item.task_id)
        assert (task_id.run, task_id.site) == (self.opened.run, item.site)
        if task_id.kind != "train":
            self.cells.add(item.task_id)
            return
        assert self.round is not None
        assert self.closed is None
        assert task_id.round == self.round.round
        assert item.site in self.round.participants
        if isinstance(item, UpdateAccepted):
            self.updates[item.site] = item
        else:
            self.failed.add(item.site)

    def close_round(self, closed: RoundClosed) -> None:
        assert self.round is not None
        assert self.closed is None
        assert (closed.round, closed.base) == (self.round.round, self.round.model)
        assert [(item.site, item.digest, item.weight) for item in closed.contributions] == [
            (site, update.digest, update.examples) for site, update in sorted(self.updates.items())
        ]
        assert len(closed.contributions) >= self.quorum
        silent = set(self.round.participants) - set(self.updates) - self.failed
        assert set(closed.stragglers) == silent
        self.closed = closed

    def publish(self, published: ModelPublished) -> None:
        assert self.closed is not None
        assert published.round == self.closed.round
        self.models[published.round] = published.model
        self.round = self.closed = None

    def score(self, scored: ModelScored) -> None:
        watch = self.opened.job.watch
        assert watch is not None
        assert scored.round not in self.scores
        assert scored.round in self.models
        assert scored.best == (self.best is None or watch.better(scored.score, self.best))
        self.scores[scored.round] = scored.score
        self.best = scored.score if scored.best else self.best

    def close_gather(self, closed: GatherClosed) -> None:
        assert self.gather is not None
        assert closed.stage == self.gather.stage
        kinds = [f"validate.{owner}" for owner in self.gather.models] or ["submit_model"]
        number = self.gather.round
        sites = self.gather.participants
        cells = {f"{RUN}/{number}/{kind}/{site}" for kind, site in product(kinds, sites)}
        assert self.cells | set(closed.gaps) == cells, "every cell has a result or a reason"
        self.gather = None


def check_log(run: Played) -> None:
    reader = Reader(run.events[0])
    for item in run.events[1:]:
        reader.read(item)
    if reader.ended and reader.ended.status == "finished":
        assert reader.round is None
        assert reader.gather is None


def most_inputs(run: Played) -> int:
    """Return how many inputs a run can need if nothing goes wrong any more."""
    sites, rounds = len(run.sites), run.state.job.rounds
    answers_and_timers = sites + 2
    gathered = sites + sites + sites * (sites + 1)
    return answers_and_timers + rounds * (sites + 1) + gathered


# ---- any interleaving ---------------------------------------------------------------------------


class Remembered(Played):
    """Remembers the outcomes of tasks that were taken, and each site's latest of every kind."""

    def __init__(self, sites: str, *source: Any, **fields: Any) -> None:
        super().__init__(sites, *source, **fields)
        self.taken: list[ResultArrived | FailureArrived] = []
        self.latest: dict[tuple[str, str], TaskId] = {}
        self.given_up: list[TaskId] = []

    def give(self, given: Input) -> Events:
        events = super().give(given)
        for event in events:
            if isinstance(event, GatherClosed) and event.reason != "deadline":
                given_up = self.state.gathers[event.stage].failed
                gaps = map(TaskId.parse, event.gaps)
                left = {gap.site for gap in gaps if gap not in given_up}
                asked = self.state.gathers[event.stage].opened.participants
                there = self.roster.usable.intersection(asked)
                assert not left & there, "who is there is waited for"
                assert left <= self.roster.disabled or there, "an outage is waited out"
        if events and isinstance(given, ResultArrived | FailureArrived):
            self.taken.append(given)
        for event in events:
            if isinstance(event, UpdateAccepted | ResultAccepted | TaskFailed):
                task_id = TaskId.parse(event.task_id)
                self.latest[task_id.site, task_id.kind] = task_id
                if not isinstance(given, ResultArrived | FailureArrived):
                    self.given_up.append(task_id)
        return events

    def is_latest(self, task_id: TaskId) -> bool:
        return self.latest[task_id.site, task_id.kind] == task_id

    @property
    def stale(self) -> str:
        """The rule that refuses what was settled before the site's latest task."""
        return "run_ended" if self.state.ended else "stale_round"


def result(run: Played, task_id: TaskId, model: str, examples: int = 5) -> ResultArrived:
    current = run.state.open_round
    base = current.opened.model.digest if current else ""
    metrics = {"accuracy": examples / 10} if examples % 3 else {}
    ref = None if task_id.owner else blob(model)
    return ResultArrived(task_id, TaskResult(ref, examples, metrics, metrics, examples, base))


any_site = st.sampled_from(SITES)


class Runs(RuleBasedStateMachine):
    """Sites, server, operator and clock do what they like; `Played` and `Reader` look on."""

    run: Remembered

    @initialize(
        sites=st.integers(1, len(SITES)),
        quorum=st.integers(1, len(SITES)),
        rounds=st.integers(1, 3),
        workflow=st.sampled_from((*WORKFLOWS, "on demand")),
        on_deadline=st.sampled_from(["extend", "abort"]),
        watch=st.sampled_from([{"metric": "accuracy", "mode": mode} for mode in ("max", "min")]),
        deployed=st.booleans(),
        seed=st.integers(0, 99),
    )
    def start(self, sites, quorum, workflow, deployed, seed, **fields):
        self.random = Random(seed)
        fields |= {"workflow": workflow, "min_clients": min(quorum, sites)}
        source = ()
        if workflow == "on demand":
            source, fields["workflow"] = (SOURCE,), ("cross_site_validation",)
        self.run = Remembered(SITES[:sites], *source, **fields)
        if deployed:
            self.run.accept()

    def teardown(self):
        if not hasattr(self, "run"):
            return
        self.run.finish(limit=most_inputs(self.run), choose=self.random.choice)
        check_log(self.run)
        self.run.crash()

    @rule(site=any_site, accepted=st.sampled_from([True, True, True, False]))
    def answer(self, site, accepted):
        expected = site in self.run.deploys
        order = self.run.state.order_of(site)
        assert self.run.give(AnswerArrived(site, accepted, order="an order of before")) == ()
        given = AnswerArrived(site, accepted, "policy", order=order)
        assert bool(self.run.give(given)) == expected

    @rule(steps=st.integers(1, 12))
    def all_goes_well(self, steps):
        for _ in range(steps):
            if work := [item for item in self.run.pending if not isinstance(item, Wake)]:
                self.run.carry_out(self.random.choice(work))

    @precondition(lambda self: self.run.offers)
    @rule(examples=st.integers(1, 9))
    def work(self, examples):
        task_id = self.random.choice(self.run.offers).id
        assert self.run.give(result(self.run, task_id, f"{task_id}", examples))

    @precondition(lambda self: self.run.offers)
    @rule()
    def give_up(self):
        task = self.random.choice(self.run.offers)
        assert self.run.give(FailureArrived(task.id, TaskFailure("broken")))

    @precondition(lambda self: self.run.taken)
    @rule()
    def send_again(self):
        given = self.random.choice(self.run.taken)
        if self.run.is_latest(given.task_id):
            assert self.run.give(given) == ()
        else:
            with self.run.refused(FailedPreconditionError, self.run.stale):
                self.run.give(given)

    @precondition(lambda self: self.run.taken)
    @rule()
    def send_something_else(self):
        task_id = self.random.choice(self.run.taken).task_id
        other = result(self.run, task_id, "other bytes", examples=99)
        if self.run.is_latest(task_id):
            with self.run.refused(AlreadyExistsError):
                self.run.give(other)
        else:
            with self.run.refused(FailedPreconditionError, self.run.stale):
                self.run.give(other)

    @rule(
        number=st.integers(0, 4),
        kind=st.sampled_from(KINDS),
        site=st.sampled_from((*SITES, "stranger")),
    )
    def send_anything(self, number, kind, site):
        task_id = TaskId(RUN, number, kind, site)
        given = result(self.run, task_id, "anything")
        if task_id in {task.id for task in self.run.offers}:
            assert self.run.give(given)
        else:
            # Metrics may happen to be those that were accepted: then it is a duplicate.
            with contextlib.suppress(FailedPreconditionError, AlreadyExistsError):
                assert not self.run.give(given)

    @precondition(lambda self: any(task.id.kind == "train" for task in self.run.offers))
    @rule()
    def train_another_model(self):
        task = self.random.choice(self.run.offers)
        with self.run.refused(FailedPreconditionError, "wrong_base"):
            self.run.update(task.id.site, base="another model")

    @rule(live=st.sets(any_site), disabled=st.sets(any_site, max_size=1))
    def come_and_go(self, live, disabled):
        self.run.roster_is(live, disabled)

    @rule()
    def all_are_there(self):
        self.run.roster_is(SITES)

    @precondition(lambda self: self.run.wakes)
    @rule()
    def time_passes(self):
        self.run.fire(self.random.choice(sorted(self.run.wakes)))

    @rule(timer=st.sampled_from(["deploy", "quorum/1", "wait/1/1", "deadline/2", "gather/x/0"]))
    def an_old_timer_fires(self, timer):
        if timer not in self.run.wakes:
            assert self.run.give(TimerFired(timer)) == ()

    @rule(number=st.integers(0, 4))
    def publish(self, number):
        expected = number in self.run.aggregations
        assert bool(self.run.publish(number)) == expected

    @rule(min_clients=st.integers(0, len(SITES) + 1))
    def set_quorum(self, min_clients):
        before = self.run.state.ended
        try:
            self.run.set_quorum(min_clients)
        except (InvalidArgumentError, FailedPreconditionError):
            return
        ended = self.run.state.ended
        assert ended == before or ended.status == "finished", "a command must not fail a run"

    @rule(sites=st.sets(any_site, min_size=1, max_size=3))
    def withdraw(self, sites):
        taking_part = self.run.state.taking_part
        kept = dict(self.run.state.open_round.accepted) if self.run.state.open_round else {}
        if self.run.state.ended or not sites <= taking_part:
            with pytest.raises((FailedPreconditionError, NotFoundError)):
                self.run.withdraw(*sorted(sites))
            return
        self.run.withdraw(*sorted(sites))
        assert not sites.intersection(task.id.site for task in self.run.offers)
        assert not sites.intersection(self.run.deploys)
        if sites == taking_part:
            assert self.run.status == "aborted"
        elif self.run.state.open_round:
            assert kept.items() <= self.run.state.open_round.accepted.items()

    @rule(sites=st.sets(any_site, min_size=1, max_size=3), order=st.integers())
    def add_targets(self, sites, order):
        state = self.run.state
        if state.ended or sites & state.taking_part:
            with pytest.raises((FailedPreconditionError, AlreadyExistsError)):
                self.run.add(*sorted(sites))
            return
        self.run.add(*sorted(sites), order=str(order))
        assert sites <= set(self.run.deploys)
        assert not sites.intersection(task.id.site for task in self.run.offers)

    @rule(site=any_site)
    def abort_task(self, site):
        mine = [task.id for task in self.run.offers if task.id.site == site]
        if not mine:
            with pytest.raises((FailedPreconditionError, NotFoundError)):
                self.run.abort_tasks(site)
            return
        events = self.run.abort_tasks(site)
        failed = [event.task_id for event in events if isinstance(event, TaskFailed)]
        assert failed == [str(task_id) for task_id in mine]
        assert site in self.run.state.taking_part

    @precondition(lambda self: self.run.given_up)
    @rule()
    def finish_what_was_given_up(self):
        task_id = self.random.choice(self.run.given_up)
        late = result(self.run, task_id, "late")
        error = AlreadyExistsError if self.run.is_latest(task_id) else FailedPreconditionError
        with pytest.raises(error):
            self.run.give(late)

    @rule(how=st.sampled_from(["not", "not", "not", "not", "abort", "break_down"]))
    def end(self, how):
        if how == "not" or self.run.state.ended:
            return
        getattr(self.run, how)()
        assert self.run.pending == ()

    @rule()
    def crash(self):
        self.run.crash()


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=120, stateful_step_count=40)


# ---- order --------------------------------------------------------------------------------------


def closed(order: list[str], quorum: int, failing: list[str], how: str) -> list[Event]:
    """Return how round 1 closed, and what was scored then, if outcomes came in this order."""
    run = training("abcdef", min_clients=quorum, watch=WATCH)
    for site in order:
        if site in failing:
            run.fail(site)
        else:
            run.update(site, examples=ord(site), accuracy=1 / ord(site), tested=ord(site) % 7)
    if not run.aggregations:
        if how == "go":
            run.go(*run.state.open_round.unsettled)
        else:
            run.fire(how)
    closing = run.last(RoundClosed).model_copy(update={"reason": ""})
    return [closing, *run.of(ModelScored)]


@given(st.data(), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=60)
def test_a_round_closes_alike_in_any_order_of_arrival(data, updates, failures):
    quorum = data.draw(st.integers(1, updates))
    failing = list("ef"[:failures])
    orders = st.permutations([*"abcd"[:updates], *failing])
    hows = st.sampled_from(["wait", "deadline", "go"])
    first, second = (closed(data.draw(orders), quorum, failing, data.draw(hows)) for _ in range(2))
    assert [encode(item) for item in first] == [encode(item) for item in second]


@given(st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_a_matrix_is_alike_in_any_order_of_arrival(random):
    run = validating("abc")
    run.submit_model(*random.sample("abc", 3))
    tasks = run.offers
    for task in random.sample(tasks, len(tasks)):
        if task.id.site == task.id.owner == "b":
            run.fail("b", "odd", task.id.kind)
        elif task.id.site != "c" or task.id.owner == "a":
            run.validate(task.id.site, task.id.owner, accuracy=len(str(task.id.kind)) / 20)
    run.fire("gather")
    assert list(run.last(GatherClosed).gaps.items()) == [
        ("7/0/validate.b/b", "odd"),
        ("7/0/validate.b/c", "deadline passed"),
        ("7/0/validate.c/c", "deadline passed"),
        ("7/0/validate.global/c", "deadline passed"),
    ]
