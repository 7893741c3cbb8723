"""A run: deploying, then the job's steps one after the other, then its one terminal event."""

from collections.abc import Iterable

from flplatform.algorithms.workflows import cross_site_validation, operator, scatter_gather
from flplatform.algorithms.workflows.draft import Draft, Timers
from flplatform.algorithms.workflows.state import (
    FAILED,
    RunState,
    evolve,
    gather_of,
    initial,
    marks,
)
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from flplatform.core.events import Blob as EventBlob
from flplatform.core.events import (
    DeployWaitOver,
    Event,
    ModelPublished,
    ResultAccepted,
    RunOpened,
    SiteAnswered,
    StepStarted,
    TaskFailed,
    UpdateAccepted,
)
from flplatform.core.messages import TRAIN, ModelRef, Task, TaskId, TaskResult
from flplatform.core.workflow import (
    Abort,
    AbortTasks,
    AddTargets,
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
    SetQuorum,
    TimerFired,
    Wake,
    Withdraw,
)

__all__ = ["classify", "decide", "evolve", "pending", "replay"]

_STEPS = {
    "scatter_gather": scatter_gather,
    "cross_site_validation": cross_site_validation,
}
_DEPLOY_TIMER = "deploy"


def replay(events: Iterable[Event]) -> RunState:
    """Return the state that a run's events add up to.

    Raises:
        FailedPreconditionError: the stream does not begin with RunOpened.
    """
    coming = iter(events)
    opened = next(coming, None)
    if not isinstance(opened, RunOpened):
        raise FailedPreconditionError("a run's stream must begin with RunOpened")
    state = initial(opened)
    for event in coming:
        state = evolve(state, event)
    return state


def pending(state: RunState) -> tuple[Instruction, ...]:
    """Return what must be done now; the same state always asks for the same."""
    if state.ended:
        return ()
    instructions: list[Instruction] = [Deploy(site, state.order_of(site)) for site in state.awaited]
    if state.step < 0:
        instructions.append(
            scatter_gather.quorum_wake(state)
            if _all_heard(state)
            else Wake(_DEPLOY_TIMER, state.job.deploy_wait_s)
        )
    else:
        instructions.extend(_STEPS[state.step_name].pending(state))
    return tuple(instructions)


def classify(state: RunState, task_id: TaskId, known_by: frozenset[str]) -> bool:
    """Return whether a result is new (True) or the accepted one again (False).

    Args:
        state: the run's state.
        task_id: the task that the result answers.
        known_by: `marks` of the result, or FAILED.

    Raises:
        AlreadyExistsError: the task is settled by something else; the first one counts.
        FailedPreconditionError: the task is not open: stale, unknown, or the run has ended.
    """
    if task_id.run != state.run:
        raise FailedPreconditionError(
            f"task {task_id} is not of run {state.run}", rule="unknown_task", hint="drop the result"
        )
    settled = state.settled.get((task_id.site, task_id.kind))
    if settled is not None and settled[0] == task_id.round:
        if settled[1] & known_by:
            return False
        raise AlreadyExistsError(
            f"task {task_id} is settled by an earlier result",
            hint="drop this one and take the next task",
        )
    if state.ended:
        raise FailedPreconditionError(
            f"run {state.run} is {state.status}: {state.ended.reason}", rule="run_ended"
        )
    if task_id.kind == TRAIN:
        _check_train(state, task_id)
    else:
        gather = gather_of(state, task_id)
        if gather is None or gather.closed:
            raise FailedPreconditionError(
                f"task {task_id} is not open", rule="task_closed", hint="drop the result"
            )
    return True


def _check_train(state: RunState, task_id: TaskId) -> None:
    current = state.open_round
    over = current is None or current.closed is not None
    if task_id.round < state.round or (task_id.round == state.round and over):
        raise FailedPreconditionError(
            f"round {task_id.round} of run {state.run} is closed: the update is stale",
            rule="stale_round",
            hint="drop it and take the next task",
        )
    if (
        current is None
        or task_id.round > state.round
        or task_id.site not in current.opened.participants
    ):
        raise FailedPreconditionError(
            f"task {task_id} was never offered", rule="unknown_task", hint="drop the result"
        )


def decide(state: RunState, given: Input, roster: Roster) -> tuple[Event, ...]:
    """Return the events that `given` brings about, in order; none if it changes nothing.

    Raises:
        AlreadyExistsError, FailedPreconditionError, InvalidArgumentError: the input is refused
            and the state unchanged.
    """
    draft = Draft(state, roster)
    fired = Timers()
    match given:
        case ResultArrived(task_id, result):
            event = _accept(task_id, result)
            if not classify(state, task_id, marks(event)):
                return ()
            if isinstance(event, UpdateAccepted):
                _check_base(state, result)
            draft.emit(event)
        case FailureArrived(task_id, failure):
            if not classify(state, task_id, FAILED):
                return ()
            draft.emit(
                TaskFailed(
                    task_id=str(task_id),
                    site=task_id.site,
                    error=failure.error,
                    traceback=failure.traceback,
                )
            )
        case AnswerArrived(site, accepted, rule, reason, isolation, order):
            # An answer may come after its site was withdrawn, or asked anew by another order.
            if state.ended or site not in state.awaited or order != state.order_of(site):
                return ()
            draft.emit(
                SiteAnswered(
                    site=site, accepted=accepted, rule=rule, reason=reason, isolation=isolation
                )
            )
        case Aggregated(number, model, optimizer_state, wire):
            current = state.open_round
            if not current or not current.closed or current.opened.round != number or state.ended:
                return ()
            draft.emit(
                ModelPublished(
                    round=number,
                    model=_blob(model),
                    optimizer_state=_maybe(optimizer_state),
                    wire=_maybe(wire),
                )
            )
        case InstructionFailed(_, error):
            if not state.ended:
                draft.end("failed", error)
        case SetQuorum():
            operator.set_quorum(draft, given)
        case AddTargets():
            operator.add_targets(draft, given)
        case Withdraw():
            operator.withdraw(draft, given, _offers(state))
        case AbortTasks():
            operator.abort_tasks(draft, given, _offers(state))
        case Abort(by, reason):
            operator.demand_active(state)
            draft.end("aborted", reason, by)
        case TimerFired(timer_id):
            wakes = {item.id for item in pending(state) if isinstance(item, Wake)}
            if timer_id not in wakes:
                return ()
            fired = Timers(timer_id)
            if timer_id == _DEPLOY_TIMER:
                draft.emit(DeployWaitOver())
    _advance(draft, fired)
    return tuple(draft.events)


def _offers(state: RunState) -> list[Task]:
    return [item.task for item in pending(state) if isinstance(item, Offer)]


def _blob(ref: ModelRef) -> EventBlob:
    return EventBlob(digest=ref.digest, size=ref.size)


def _maybe(ref: ModelRef | None) -> EventBlob | None:
    return None if ref is None else _blob(ref)


def _accept(task_id: TaskId, result: TaskResult) -> UpdateAccepted | ResultAccepted:
    if task_id.owner:
        blob = EventBlob(digest="", size=0)
    elif result.blob is None:
        raise InvalidArgumentError(f"a {task_id.kind} result needs a model", field="blob")
    else:
        blob = EventBlob(digest=result.blob.digest, size=result.blob.size)
    if task_id.kind != TRAIN:
        return ResultAccepted(
            task_id=str(task_id),
            site=task_id.site,
            digest=blob.digest,
            size=blob.size,
            examples=result.examples,
            metrics=dict(result.metrics),
        )
    if result.examples < 1:
        raise InvalidArgumentError(
            f"is {result.examples}; an update needs at least one example behind it",
            field="examples",
            hint="a site without data should fail the task instead",
        )
    return UpdateAccepted(
        task_id=str(task_id),
        site=task_id.site,
        round=task_id.round,
        digest=blob.digest,
        size=blob.size,
        examples=result.examples,
        metrics=dict(result.metrics),
        received=dict(result.received),
        received_examples=result.received_examples,
        wire=result.wire,
    )


def _check_base(state: RunState, result: TaskResult) -> None:
    assert state.open_round is not None
    expected = state.open_round.opened.model.digest
    if result.trained_from != expected:
        raise FailedPreconditionError(
            f"the update was trained from {result.trained_from[:80]!r}, "
            f"round {state.round} started from {expected}",
            rule="wrong_base",
        )


def _advance(draft: Draft, fired: Timers) -> None:
    """Go on as far as the state and the roster allow."""
    while not draft.state.ended:
        if draft.state.step < 0:
            if not _deploy_done(draft, fired):
                return
        elif not _STEPS[draft.state.step_name].advance(draft, fired):
            return
        following = draft.state.step + 1
        if following == len(draft.state.job.workflow):
            draft.end("finished", "all steps done")
        else:
            draft.emit(StepStarted(index=following, step=draft.state.job.workflow[following]))


def _deploy_done(draft: Draft, fired: Timers) -> bool:
    state = draft.state
    if len(state.taking_part) < state.min_clients:
        draft.end(
            "failed",
            f"quorum {state.min_clients} of {len(state.targets)} cannot be reached: "
            + _absences(state),
        )
        return False
    if scatter_gather.quorum_lost(draft, fired):
        return False
    # Whom an admin has barred cannot fetch the job: he may answer when he takes part again.
    heard = _all_heard(state) or draft.roster.disabled.issuperset(state.awaited)
    return heard and len(draft.usable) >= state.min_clients


def _all_heard(state: RunState) -> bool:
    """Return whether no answer is waited for any more: from here on only a quorum is."""
    return state.deploy_wait_over or not state.awaited


def _absences(state: RunState) -> str:
    """Say of each target that has no part any more why not."""
    why = {
        site: f"declined ({answer.rule or 'error'}: {answer.reason})"
        for site, answer in state.answers.items()
        if not answer.accepted
    }
    why |= {site: event.reason for site, event in state.withdrawn.items()}
    return "; ".join(f"{site} {why[site]}" for site in sorted(why))
