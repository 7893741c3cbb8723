"""The state of a run, as its events made it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from flplatform.core.events import (
    Blob,
    DeadlineExtended,
    DeployWaitOver,
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
    StepStarted,
    TargetsAdded,
    TaskFailed,
    UpdateAccepted,
)
from flplatform.core.job import JobSpec
from flplatform.core.messages import TRAIN, TaskId

T = TypeVar("T")

Settled = tuple[int, frozenset[str]]
"""Round of the last settled task of a (site, kind), and the marks of what settled it."""

FAILED = frozenset({"failed"})
"""Marks of a task settled by a failure."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    """A round between RoundOpened and ModelPublished."""

    opened: RoundOpened
    accepted: Mapping[str, UpdateAccepted] = field(default_factory=dict)
    failed: Mapping[str, TaskFailed] = field(default_factory=dict)
    extended: bool = False
    closed: RoundClosed | None = None

    @property
    def unsettled(self) -> tuple[str, ...]:
        """Participants with neither an update nor a failure, in name order."""
        return tuple(
            site
            for site in self.opened.participants
            if site not in self.accepted and site not in self.failed
        )

    @property
    def possible(self) -> int:
        """The number of updates that the round can still end up with."""
        return len(self.opened.participants) - len(self.failed)


@dataclass(frozen=True, slots=True)
class Gather:
    """A gathering between GatherOpened and GatherClosed, and after it what it brought."""

    opened: GatherOpened
    results: Mapping[TaskId, ResultAccepted] = field(default_factory=dict)
    failed: Mapping[TaskId, TaskFailed] = field(default_factory=dict)
    closed: GatherClosed | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything that later decisions depend on; made by `evolve` alone.

    Attributes:
        opened: the run's first event.
        min_clients: quorum as it is now.
        answers: target → its answer to the signed start that it was last given.
        added: target that joined later → its own signed start order, base64.
        withdrawn: target at which an admin ended the run → how.
        step: index into the job's workflow; -1 while deploying.
        step_first_round: the number of rounds before the current step.
        round: number of the last opened round, 0 before the first; of a validation on demand
            that of its source run.
        models: round → published global model; 0 is the initial model.
        wires: round → that model as sites download it for training, if it has such a form.
        scores: round → the watched metric of that round's model.
        best_round: round of the best scored model, None before the first score.
        open_round: the round being worked on.
        optimizer_state: what the server optimiser keeps since the latest round.
        gathers: stage → gathering of the current or an earlier step.
        settled: (site, kind) → what settled that site's latest task of the kind.
        ended: the terminal event.
    """

    opened: RunOpened
    min_clients: int
    models: Mapping[int, Blob]
    wires: Mapping[int, Blob] = field(default_factory=dict)
    answers: Mapping[str, SiteAnswered] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    withdrawn: Mapping[str, SiteWithdrawn] = field(default_factory=dict)
    deploy_wait_over: bool = False
    step: int = -1
    step_first_round: int = 0
    round: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)
    best_round: int | None = None
    open_round: OpenRound | None = None
    optimizer_state: Blob | None = None
    gathers: Mapping[str, Gather] = field(default_factory=dict)
    settled: Mapping[tuple[str, str], Settled] = field(default_factory=dict)
    ended: RunEnded | None = None

    @property
    def run(self) -> int:
        """The run's number."""
        return self.opened.run

    @property
    def job(self) -> JobSpec:
        """The job as it was submitted."""
        return self.opened.job

    @property
    def step_name(self) -> str:
        """Name of the current step; empty while deploying."""
        return self.job.workflow[self.step] if 0 <= self.step < len(self.job.workflow) else ""

    @property
    def status(self) -> str:
        """`deploying`, `training`, `validating`, or how the run ended."""
        if self.ended:
            return self.ended.status
        if self.step < 0:
            return "deploying"
        return "training" if self.step_name == "scatter_gather" else "validating"

    @property
    def targets(self) -> tuple[str, ...]:
        """Every site that the run was ever meant for, in name order."""
        return tuple(sorted({*self.opened.sites, *self.added}))

    @property
    def taking_part(self) -> frozenset[str]:
        """Targets that have neither declined nor been withdrawn."""
        return frozenset(
            site
            for site in self.targets
            if site not in self.withdrawn
            and (site not in self.answers or self.answers[site].accepted)
        )

    @property
    def awaited(self) -> tuple[str, ...]:
        """Targets whose answer to the signed start is still to come, in name order."""
        return tuple(site for site in sorted(self.taking_part) if site not in self.answers)

    @property
    def deployed(self) -> frozenset[str]:
        """Targets that accepted the run and still have it."""
        return frozenset(
            site
            for site, answer in self.answers.items()
            if answer.accepted and site not in self.withdrawn
        )

    def order_of(self, site: str) -> str:
        """Return the signed start order that a target verifies, base64."""
        return self.added.get(site, self.opened.order)

    @property
    def model(self) -> Blob:
        """The latest global model."""
        return self.models[max(self.models)]

    @property
    def best_model(self) -> tuple[int, Blob]:
        """Round and blob of the best global model; of the latest if nothing was scored."""
        best = max(self.models) if self.best_round is None else self.best_round
        return best, self.models[best]


def marks(event: UpdateAccepted | ResultAccepted) -> frozenset[str]:
    """Return what two equal results of one task have in common, and unequal ones have not.

    An update that a codec has carried is known by the bytes that came and by what they came to.
    """
    if isinstance(event, UpdateAccepted) and event.wire:
        return frozenset({event.digest, event.wire})
    if event.digest:
        return frozenset({event.digest})
    metrics = sorted(event.metrics.items())
    return frozenset({f"{event.examples} {metrics}"})


def initial(opened: RunOpened) -> RunState:
    """Return the state after the run's first event."""
    models = {0: opened.initial_model}
    wires = {0: opened.wire} if opened.wire else {}
    return RunState(opened, opened.min_clients, models, wires, round=opened.source_round)


def evolve(state: RunState, event: Event) -> RunState:
    """Return the state after `event`; total over every event a run's stream can hold."""
    match event:
        case SiteAnswered():
            return replace(state, answers={**state.answers, event.site: event})
        case SiteWithdrawn():
            return replace(state, withdrawn={**state.withdrawn, event.site: event})
        case TargetsAdded():
            return replace(
                state,
                added={**state.added, **dict.fromkeys(event.sites, event.order)},
                answers=_without(state.answers, event.sites),
                withdrawn=_without(state.withdrawn, event.sites),
            )
        case DeployWaitOver():
            return replace(state, deploy_wait_over=True)
        case StepStarted():
            return replace(state, step=event.index, step_first_round=state.round)
        case RoundOpened():
            return replace(state, round=event.round, open_round=OpenRound(event))
        case UpdateAccepted():
            return _with_round(
                _settle(state, event.site, TRAIN, event.round, marks(event)),
                accepted={**_round(state).accepted, event.site: event},
            )
        case ResultAccepted():
            return _gathered(state, TaskId.parse(event.task_id), event)
        case TaskFailed():
            return _failed(state, TaskId.parse(event.task_id), event)
        case DeadlineExtended():
            return _with_round(state, extended=True)
        case RoundClosed():
            return _with_round(state, closed=event)
        case ModelPublished():
            models = {**state.models, event.round: event.model}
            wires = {**state.wires, event.round: event.wire} if event.wire else state.wires
            return replace(
                state,
                models=models,
                wires=wires,
                optimizer_state=event.optimizer_state,
                open_round=None,
            )
        case ModelScored():
            return replace(
                state,
                scores={**state.scores, event.round: event.score},
                best_round=event.round if event.best else state.best_round,
            )
        case GatherOpened():
            return replace(state, gathers={**state.gathers, event.stage: Gather(event)})
        case GatherClosed():
            gather = replace(state.gathers[event.stage], closed=event)
            return replace(state, gathers={**state.gathers, event.stage: gather})
        case QuorumSet():
            return replace(state, min_clients=event.min_clients)
        case RunEnded():
            return replace(state, ended=event)
        case _:
            raise TypeError(f"{type(event).__name__} does not belong into a run's stream")


def gather_of(state: RunState, task_id: TaskId) -> Gather | None:
    """Return the gathering that a task belongs to, open or closed."""
    for gather in state.gathers.values():
        opened = gather.opened
        if opened.round != task_id.round or task_id.site not in opened.participants:
            continue
        if task_id.owner in opened.models if task_id.owner else opened.stage == "submit":
            return gather
    return None


def _without(mapping: Mapping[str, T], keys: Collection[str]) -> dict[str, T]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _round(state: RunState) -> OpenRound:
    assert state.open_round is not None
    return state.open_round


def _with_round(state: RunState, **changes: Any) -> RunState:
    return replace(state, open_round=replace(_round(state), **changes))


def _settle(state: RunState, site: str, kind: str, number: int, by: frozenset[str]) -> RunState:
    return replace(state, settled={**state.settled, (site, kind): (number, by)})


def _gathered(state: RunState, task_id: TaskId, event: ResultAccepted) -> RunState:
    gather = gather_of(state, task_id)
    assert gather is not None
    gather = replace(gather, results={**gather.results, task_id: event})
    state = _settle(state, task_id.site, task_id.kind, task_id.round, marks(event))
    return replace(state, gathers={**state.gathers, gather.opened.stage: gather})


def _failed(state: RunState, task_id: TaskId, event: TaskFailed) -> RunState:
    state = _settle(state, task_id.site, task_id.kind, task_id.round, FAILED)
    if task_id.kind == TRAIN:
        return _with_round(state, failed={**_round(state).failed, task_id.site: event})
    gather = gather_of(state, task_id)
    assert gather is not None
    gather = replace(gather, failed={**gather.failed, task_id: event})
    return replace(state, gathers={**state.gathers, gather.opened.stage: gather})
