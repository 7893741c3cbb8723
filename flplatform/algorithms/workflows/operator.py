"""What operators change in a run that goes on: its quorum, its targets, its open tasks."""

from collections.abc import Iterable, Sequence

from flplatform.algorithms.workflows.draft import Draft
from flplatform.algorithms.workflows.state import RunState
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.core.events import QuorumSet, SiteWithdrawn, TargetsAdded, TaskFailed
from flplatform.core.job import check_targets
from flplatform.core.messages import Task
from flplatform.core.workflow import AbortTasks, AddTargets, SetQuorum, Withdraw


def demand_active(state: RunState) -> None:
    """Refuse a change of a run that has ended.

    Raises:
        FailedPreconditionError: it has.
    """
    if state.ended:
        raise FailedPreconditionError(
            f"run {state.run} has {state.status}: {state.ended.reason}", rule="run_ended"
        )


def set_quorum(draft: Draft, given: SetQuorum) -> None:
    """Change the run's `min_clients`.

    Raises:
        InvalidArgumentError, FailedPreconditionError: out of bounds, or out of reach by now.
    """
    state, wanted = draft.state, given.min_clients
    demand_active(state)
    targets = len(state.targets)
    if not 1 <= wanted <= targets:
        raise InvalidArgumentError(
            f"is {wanted}; run {state.run} has {targets} target sites",
            field="min_clients",
            hint=f"give 1 to {targets}",
        )
    reachable = len(state.taking_part)
    current = state.open_round
    if current and not current.closed:
        reachable = min(reachable, current.possible)
    if wanted > reachable:
        raise FailedPreconditionError(
            f"run {state.run} would fail: now at most {reachable} updates can come together",
            rule="quorum_unreachable",
            hint=f"give 1 to {reachable}",
        )
    if wanted != state.min_clients:
        draft.emit(QuorumSet(min_clients=wanted, by=given.by))


def add_targets(draft: Draft, given: AddTargets) -> None:
    """Have sites join from the next round on.

    Raises:
        InvalidArgumentError, AlreadyExistsError, FailedPreconditionError: not these sites, or
            the run has ended.
    """
    state = draft.state
    demand_active(state)
    check_targets(given.sites, 0)
    if inside := sorted(state.taking_part.intersection(given.sites)):
        raise AlreadyExistsError(
            f"{', '.join(inside)} takes part in run {state.run} already", field="sites"
        )
    draft.emit(TargetsAdded(sites=given.sites, order=given.order, by=given.by))


def withdraw(draft: Draft, given: Withdraw, offers: Iterable[Task]) -> None:
    """End the run at some sites; at all that are left, end it.

    Raises:
        NotFoundError, FailedPreconditionError: a site has no part in the run, or it has ended.
    """
    _demand_part(draft.state, given.sites)
    if draft.state.taking_part <= set(given.sites):
        draft.end("aborted", given.reason, given.by)
        return
    for site in dict.fromkeys(given.sites):
        draft.emit(SiteWithdrawn(site=site, by=given.by, reason=given.reason))
    _give_up(draft, given.sites, offers, given.reason)


def abort_tasks(draft: Draft, given: AbortTasks, offers: Sequence[Task]) -> None:
    """Give up what some sites are working on.

    Raises:
        NotFoundError, FailedPreconditionError: a site has no part in the run or nothing to do,
            or the run has ended.
    """
    _demand_part(draft.state, given.sites)
    busy = {task.id.site for task in offers}
    if idle := sorted(set(given.sites) - busy):
        raise FailedPreconditionError(
            f"{', '.join(idle)} has no open task in run {draft.state.run}", rule="no_open_task"
        )
    _give_up(draft, given.sites, offers, f"aborted by {given.by}")


def _demand_part(state: RunState, sites: Iterable[str]) -> None:
    demand_active(state)
    for site in sites:
        if site not in state.targets:
            raise NotFoundError(f"{site} is no target of run {state.run}", field="sites")
        if site not in state.taking_part:
            how = "was withdrawn from" if site in state.withdrawn else "declined"
            raise FailedPreconditionError(f"{site} {how} run {state.run}", rule="no_part")


def _give_up(draft: Draft, sites: Sequence[str], offers: Iterable[Task], error: str) -> None:
    """Settle the open tasks of sites, each with the reason."""
    for task in offers:
        if task.id.site in sites:
            draft.emit(TaskFailed(task_id=str(task.id), site=task.id.site, error=error))
