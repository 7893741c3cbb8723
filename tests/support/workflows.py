"""A run played on its pure core: inputs go in, events come out, each decision meets replay."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, TypeVar

import pytest

from flplatform.algorithms.workflows import RunState, classify, decide, evolve, pending, replay
from flplatform.core.errors import FLError
from flplatform.core.events import (
    Blob,
    Event,
    RunOpened,
    SourceModel,
    decode,
    encode,
    run_stream,
)
from flplatform.core.job import MODEL_FILE, JobSpec, parse_job
from flplatform.core.messages import (
    SUBMIT_MODEL,
    TRAIN,
    VALIDATE,
    ModelRef,
    Task,
    TaskFailure,
    TaskId,
    TaskResult,
)
from flplatform.core.workflow import (
    Abort,
    AbortTasks,
    AddTargets,
    Aggregate,
    Aggregated,
    AnswerArrived,
    Deploy,
    FailureArrived,
    Input,
    Instruction,
    InstructionFailed,
    Offer,
    ResultArrived,
    Roster,
    RosterChanged,
    SetQuorum,
    TimerFired,
    Wake,
    Withdraw,
)

RUN = 7
WATCH = {"metric": "accuracy"}
INITIAL = "initial model"
Events = tuple[Event, ...]
E = TypeVar("E", bound=Event)


def digest(name: str) -> str:
    """Return a digest that stands for the bytes called `name`."""
    return sha256(name.encode()).hexdigest()


def blob(name: str) -> ModelRef:
    return ModelRef(digest(name), 100)


def job(**fields: Any) -> JobSpec:
    """Return a job of one round and two needed sites, changed by `fields` as in `job.yml`."""
    plain = {
        "name": "test",
        "executor": {"module": "code"},
        "initial_model": {"file": MODEL_FILE},
        "workflow": ["scatter_gather"],
        "min_clients": 2,
    }
    return parse_job(json.dumps(plain | fields))


SOURCE: dict[str, Any] = {
    "source_run": RUN - 2,
    "source_round": 3,
    "source_models": {
        "a": SourceModel(digest=digest("best of a"), size=100, kind="local", round=3),
        "b": SourceModel(digest=digest("3/b"), size=100, kind="update", round=3),
        "global": SourceModel(digest=digest("global 2"), size=100, kind="best", round=2),
    },
    "source_gaps": {"c": "it handed none in, and no update of it is kept"},
}
"""Of a run that validates the models of an earlier one."""


def run_opened(sites: Iterable[str], spec: JobSpec, **source: Any) -> RunOpened:
    return RunOpened(
        run=RUN,
        job=spec,
        job_blob=Blob(digest=digest("job"), size=1000),
        submission_id=digest("submission")[:32],
        submitter="lead",
        submitter_organisation="hospital",
        order="",
        sites=tuple(sites),
        min_clients=spec.min_clients,
        initial_model=Blob(digest=digest(INITIAL), size=100),
        **source,
    )


def first(items: list[Instruction]) -> Instruction:
    return items[0]


class Played:
    """A run, its log and the roster; all sites are live from the start.

    Every input goes through `give`, which checks that deciding is pure, that the state is what
    the log replays to, and that what is pending makes sense.
    """

    def __init__(
        self, sites: Iterable[str] = "abc", source: Mapping[str, Any] | None = None, **fields: Any
    ) -> None:
        opened = run_opened(sites, job(**fields), **(source or {}))
        self.roster = Roster(frozenset(opened.sites))
        self.events: list[Event] = [opened]
        self.state: RunState = replay(self.events)

    def give(self, given: Input) -> Events:
        events = decide(self.state, given, self.roster)
        assert decide(self.state, given, self.roster) == events
        for event in events:
            self.state = evolve(self.state, event)
        self.events += events
        replayed = replay(self.events)
        assert replayed == self.state
        assert pending(replayed) == self.pending
        self._check_pending()
        return events

    def crash(self) -> None:
        """Forget the state and read it back from the stored log."""
        stored = [encode(event) for event in self.events]
        self.events = [decode(*row, where=run_stream(RUN)) for row in stored]
        before, self.state = self.state, replay(self.events)
        assert self.state == before

    def _check_pending(self) -> None:
        offers = [task.id for task in self.offers]
        assert len(set(offers)) == len(offers)
        assert all(classify(self.state, task_id, frozenset({"new"})) for task_id in offers)
        movers = [item for item in self.pending if isinstance(item, Wake | Aggregate)]
        assert len({item.id for item in movers}) == len(movers)
        assert bool(movers) != bool(self.state.ended), "a run that goes on never just waits"

    # ---- what can be seen ----

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that the run was ever meant for."""
        return self.state.targets

    @property
    def pending(self) -> tuple[Instruction, ...]:
        return pending(self.state)

    @property
    def offers(self) -> list[Task]:
        return [item.task for item in self.pending if isinstance(item, Offer)]

    @property
    def offered(self) -> list[str]:
        """Open tasks as `round/kind/site`."""
        return [str(task.id).partition("/")[2] for task in self.offers]

    @property
    def wakes(self) -> dict[str, float]:
        """Running timers: id → seconds."""
        return {item.id: item.after_s for item in self.pending if isinstance(item, Wake)}

    @property
    def deploys(self) -> list[str]:
        return [item.site for item in self.pending if isinstance(item, Deploy)]

    @property
    def aggregations(self) -> list[int]:
        return [item.closed.round for item in self.pending if isinstance(item, Aggregate)]

    @property
    def status(self) -> str:
        return self.state.status

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def last(self, kind: type[E]) -> E:
        return self.of(kind)[-1]

    def task(self, site: str, kind: str = TRAIN, number: int | None = None) -> TaskId:
        return TaskId(RUN, self.state.round if number is None else number, kind, site)

    # ---- sites ----

    def accept(self, *sites: str) -> "Played":
        for site in sites or self.sites:
            self.give(AnswerArrived(site, True, order=self.state.order_of(site)))
        return self

    def decline(self, site: str, rule: str = "accept_jobs", reason: str = "not today") -> Events:
        order = self.state.order_of(site)
        return self.give(AnswerArrived(site, False, rule, reason, order=order))

    def roster_is(self, live: Iterable[str], disabled: Iterable[str] = ()) -> Events:
        self.roster = Roster(frozenset(live), frozenset(disabled))
        return self.give(RosterChanged())

    def come(self, *sites: str) -> Events:
        return self.roster_is(self.roster.live.union(sites), self.roster.disabled)

    def go(self, *sites: str) -> Events:
        return self.roster_is(self.roster.live.difference(sites), self.roster.disabled)

    def disable(self, *sites: str) -> Events:
        return self.roster_is(self.roster.live, self.roster.disabled.union(sites))

    # ---- tasks ----

    def update(
        self,
        site: str,
        *,
        number: int | None = None,
        model: str = "",
        base: str = "",
        examples: int = 10,
        accuracy: float | None = None,
        tested: int = 10,
        **metrics: float,
    ) -> Events:
        """Hand in an update; `accuracy` is the received model's, on `tested` examples."""
        task_id = self.task(site, number=number)
        current = self.state.open_round
        trained_from = current.opened.model.digest if current else ""
        result = TaskResult(
            blob(model or f"{task_id.round}/{site}"),
            examples,
            metrics,
            {} if accuracy is None else {"accuracy": accuracy},
            tested,
            digest(base) if base else trained_from,
        )
        return self.give(ResultArrived(task_id, result))

    def updates(self, *sites: str, **changes: Any) -> "Played":
        for site in sites:
            self.update(site, **changes)
        return self

    def submit_model(self, *sites: str) -> None:
        for site in sites:
            result = TaskResult(blob(f"best of {site}"), 0)
            self.give(ResultArrived(self.task(site, SUBMIT_MODEL), result))

    def validate(self, site: str, owner: str, accuracy: float = 0.5, examples: int = 10) -> Events:
        result = TaskResult(None, examples, {"accuracy": accuracy})
        return self.give(ResultArrived(self.task(site, VALIDATE + owner), result))

    def fail(self, site: str, error: str = "out of memory", kind: str = TRAIN) -> Events:
        return self.give(FailureArrived(self.task(site, kind), TaskFailure(error, "Traceback")))

    def do(self, task: Task) -> Events:
        """Hand in a plain result for an open task."""
        match task.id.kind:
            case "train":
                return self.update(task.id.site, accuracy=0.5)
            case "submit_model":
                self.submit_model(task.id.site)
                return ()
            case _:
                return self.validate(task.id.site, task.id.owner)

    # ---- the server and the operator ----

    def publish(self, number: int | None = None, model: str = "") -> Events:
        number = self.state.round if number is None else number
        return self.give(Aggregated(number, blob(model or f"global {number}")))

    def fire(self, prefix: str) -> Events:
        """Let the one running timer whose id starts with `prefix` end."""
        (timer,) = (wake for wake in self.wakes if wake.startswith(prefix))
        events = self.give(TimerFired(timer))
        assert timer not in self.wakes, "a timer fires once: its firing must bring the run on"
        return events

    def set_quorum(self, min_clients: int) -> Events:
        return self.give(SetQuorum(min_clients, "operator"))

    def add(self, *sites: str, order: str = "another start") -> Events:
        return self.give(AddTargets(sites, order, "operator"))

    def withdraw(self, *sites: str) -> Events:
        return self.give(Withdraw(sites, "operator", "withdrawn by operator"))

    def abort_tasks(self, *sites: str) -> Events:
        return self.give(AbortTasks(sites, "operator"))

    def abort(self) -> Events:
        return self.give(Abort("operator", "wrong data"))

    def break_down(self, error: str = "disk on fire") -> Events:
        return self.give(InstructionFailed("aggregate/1", error))

    def round(self, *sites: str, **changes: Any) -> "Played":
        """Play the open round: these sites update it, then its model is published."""
        self.updates(*sites or self.sites, **changes).publish()
        return self

    def carry_out(self, item: Instruction) -> None:
        match item:
            case Offer(task):
                self.do(task)
            case Aggregate(closed):
                self.publish(closed.round)
            case Deploy(site):
                self.accept(site)
            case Wake(timer):
                self.fire(timer)

    def finish(
        self, limit: int = 1000, choose: Callable[[list[Instruction]], Instruction] = first
    ) -> int:
        """Let everybody do what is pending, and time pass only when nothing is.

        Returns:
            The number of inputs that it took to end the run.
        """
        self.roster_is(self.sites)
        for count in range(limit + 1):
            if self.state.ended:
                return count
            wakes = [item for item in self.pending if isinstance(item, Wake)]
            work = [item for item in self.pending if item not in wakes]
            self.carry_out(choose(work or wakes))
        raise AssertionError(f"the run goes on after {limit} inputs: {self.pending}")

    @contextmanager
    def refused(
        self, error: type[FLError], rule: str = ""
    ) -> Iterator[pytest.ExceptionInfo[FLError]]:
        """Expect that what follows is refused by name and changes nothing."""
        before: tuple[RunState, Sequence[Event]] = self.state, tuple(self.events)
        with pytest.raises(error) as caught:
            yield caught
        assert caught.value.rule == rule
        assert (self.state, tuple(self.events)) == before


def training(sites: Iterable[str] = "abc", **fields: Any) -> Played:
    """Return a run that all `sites` accepted, with round 1 open."""
    return Played(sites, **fields).accept()


def validating(sites: Iterable[str] = "ab", **fields: Any) -> Played:
    """Return a run of cross-site validation that all `sites` accepted."""
    return Played(sites, **{"workflow": ["cross_site_validation"], **fields}).accept()


def revalidating(sites: Iterable[str] = "ab", **fields: Any) -> Played:
    """Return a run that validates models of an earlier one, accepted by all `sites`."""
    fields = {"workflow": ["cross_site_validation"], "min_clients": 1, **fields}
    return Played(sites, SOURCE, **fields).accept()
