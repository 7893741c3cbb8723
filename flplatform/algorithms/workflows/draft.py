"""A decision in the making: events so far, and the state they lead to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from flplatform.algorithms.workflows.state import Gather, RunState, evolve
from flplatform.core.events import Blob, Event, GatherClosed, GatherOpened, RunEnded
from flplatform.core.messages import SUBMIT_MODEL, VALIDATE, ModelRef, Task, TaskId, task_seed
from flplatform.core.workflow import Instruction, Offer, Roster, Wake

Stage = Literal["score", "submit", "validate"]


@dataclass(frozen=True, slots=True)
class Timers:
    """The timer that fired with this input, if one did."""

    id: str = ""

    def has(self, wake: Wake) -> bool:
        """Return whether `wake` is over."""
        return wake.id == self.id


class Draft:
    """Collects the events of one decision; reads see the state with all of them applied."""

    def __init__(self, state: RunState, roster: Roster) -> None:
        self.state = state
        self.roster = roster
        self.events: list[Event] = []

    @property
    def usable(self) -> tuple[str, ...]:
        """Sites that have the run and can take part now, in name order."""
        return tuple(sorted(self.state.deployed & self.roster.usable))

    def emit(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)
        self.state = evolve(self.state, event)

    def end(
        self, status: Literal["finished", "failed", "aborted"], reason: str, by: str = ""
    ) -> None:
        """Add the terminal event."""
        self.emit(RunEnded(status=status, reason=reason, by=by))

    def open_gather(
        self, stage: Stage, participants: tuple[str, ...], models: dict[str, Blob]
    ) -> None:
        """Open tasks that need no quorum."""
        self.emit(
            GatherOpened(
                stage=stage, round=self.state.round, participants=participants, models=models
            )
        )

    def close_gather(self, stage: Stage, fired: Timers) -> bool:
        """Close a gathering if nobody is left to wait for or its deadline passed.

        Who is away is not waited for while others are there; if nobody is, an outage is likelier
        than that all have left, and everybody is waited for until the deadline.

        Returns:
            Whether the gathering is closed now.
        """
        gather = self.state.gathers[stage]
        if gather.closed:
            return True
        late = fired.has(gather_wake(self.state, gather))
        # A withdrawn site has no open task.
        there = self.roster.usable.intersection(gather.opened.participants)
        waiting = there or set(gather.opened.participants) - self.roster.disabled
        if not late and any(_open_ids(self.state, gather, waiting)):
            return False
        gaps = {
            str(task_id): gather.failed[task_id].error
            if task_id in gather.failed
            else self._absence(task_id.site)
            for task_id in _ids(self.state, gather, gather.opened.participants)
            if task_id not in gather.results
        }
        reason = "deadline" if late else "all participants answered"
        self.emit(GatherClosed(stage=stage, reason=reason, gaps=gaps))
        return True

    def _absence(self, site: str) -> str:
        if site in self.roster.disabled:
            return "site disabled"
        return "deadline passed" if site in self.roster.live else "site not connected"


def gather_wake(state: RunState, gather: Gather) -> Wake:
    """Return the deadline of a gathering."""
    opened = gather.opened
    return Wake(f"gather/{opened.stage}/{opened.round}", state.job.validate_deadline_s)


def gather_tasks(state: RunState, gather: Gather) -> list[Task]:
    """Return the tasks of a gathering that are not settled, in site and owner order."""
    models = {
        owner: ModelRef(blob.digest, blob.size) for owner, blob in gather.opened.models.items()
    }
    return [
        Task(
            task_id,
            task_seed(state.job.seed, task_id.round, task_id.kind, task_id.site),
            models.get(task_id.owner),
        )
        for task_id in _open_ids(state, gather, gather.opened.participants)
    ]


def _open_ids(state: RunState, gather: Gather, sites: Iterable[str]) -> Iterator[TaskId]:
    return (
        task_id
        for task_id in _ids(state, gather, sites)
        if task_id not in gather.results and task_id not in gather.failed
    )


def _ids(state: RunState, gather: Gather, sites: Iterable[str]) -> Iterator[TaskId]:
    """Yield the ids of all tasks that `sites` have in a gathering."""
    opened = gather.opened
    kinds = [VALIDATE + owner for owner in sorted(opened.models)]
    if opened.stage == "submit":
        kinds = [SUBMIT_MODEL]
    for site in sites:
        for kind in kinds:
            yield TaskId(state.run, opened.round, kind, site)


def gather_pending(state: RunState, stage: Stage) -> list[Instruction]:
    """Return the instructions of an open gathering; none if it is closed or not begun."""
    gather = state.gathers.get(stage)
    if gather is None or gather.closed:
        return []
    offers: list[Instruction] = [Offer(task) for task in gather_tasks(state, gather)]
    return [*offers, gather_wake(state, gather)]
