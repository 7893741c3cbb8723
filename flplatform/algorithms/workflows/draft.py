"""A decision in the making: events so far, and the state they lead to."""

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

        Returns:
            Whether the gathering is closed now.
        """
        gather = self.state.gathers[stage]
        if gather.closed:
            return True
        open_tasks = gather_tasks(self.state, gather)
        late = fired.has(gather_wake(self.state, gather))
        if not late and any(task.id.site in self.roster.usable for task in open_tasks):
            return False
        gaps = {str(task_id): failure.error for task_id, failure in gather.failed.items()}
        for task in open_tasks:
            here = task.id.site in self.roster.usable
            gaps[str(task.id)] = "deadline passed" if here else "site not connected"
        reason = "deadline" if late else "all participants answered"
        self.emit(GatherClosed(stage=stage, reason=reason, gaps=gaps))
        return True


def gather_wake(state: RunState, gather: Gather) -> Wake:
    """Return the deadline of a gathering."""
    opened = gather.opened
    return Wake(f"gather/{opened.stage}/{opened.round}", state.job.validate_deadline_s)


def gather_tasks(state: RunState, gather: Gather) -> list[Task]:
    """Return the tasks of a gathering that are not settled, in site and owner order."""
    opened = gather.opened
    kinds: dict[str, ModelRef | None] = {SUBMIT_MODEL: None}
    if opened.stage != "submit":
        kinds = {
            VALIDATE + owner: ModelRef(blob.digest, blob.size)
            for owner, blob in sorted(opened.models.items())
        }
    tasks = []
    for site in opened.participants:
        for kind, model in kinds.items():
            task_id = TaskId(state.run, opened.round, kind, site)
            if task_id not in gather.results and task_id not in gather.failed:
                seed = task_seed(state.job.seed, opened.round, kind, site)
                tasks.append(Task(task_id, seed, model))
    return tasks


def gather_pending(state: RunState, stage: Stage) -> list[Instruction]:
    """Return the instructions of an open gathering; none if it is closed or not begun."""
    gather = state.gathers.get(stage)
    if gather is None or gather.closed:
        return []
    offers: list[Instruction] = [Offer(task) for task in gather_tasks(state, gather)]
    return [*offers, gather_wake(state, gather)]
