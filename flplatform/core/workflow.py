"""What goes into a workflow and what comes out: values only.

A workflow is `decide(state, input) -> events`, `evolve(state, event) -> state` and
`pending(state) -> instructions`, all pure. `algorithms.workflows` implements them; `server.runs`
carries them out.
"""

from dataclasses import dataclass
from typing import TypeAlias

from flplatform.core.events import RoundClosed
from flplatform.core.messages import ModelRef, Task, TaskFailure, TaskId, TaskResult


@dataclass(frozen=True, slots=True)
class Roster:
    """The sites as they are at the moment of a decision."""

    live: frozenset[str]
    disabled: frozenset[str] = frozenset()

    @property
    def usable(self) -> frozenset[str]:
        """Sites that can take part now."""
        return self.live - self.disabled


# ---- inputs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResultArrived:
    """A checked result whose blob, if any, is durable."""

    task_id: TaskId
    result: TaskResult


@dataclass(frozen=True, slots=True)
class FailureArrived:
    """A site gave a task up."""

    task_id: TaskId
    failure: TaskFailure


@dataclass(frozen=True, slots=True)
class AnswerArrived:
    """A target accepted or declined the run, asked by `order`, base64."""

    site: str
    accepted: bool
    rule: str = ""
    reason: str = ""
    isolation: str = ""
    order: str = ""


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """A site came or went; the roster beside the input says what is now."""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The wake-up with this id is over."""

    id: str


@dataclass(frozen=True, slots=True)
class Aggregated:
    """An aggregation is done, its model and the optimiser's state are durable.

    `wire` is the model as sites download it for training, if it has such a form.
    """

    round: int
    model: ModelRef
    state: ModelRef | None = None
    wire: ModelRef | None = None


@dataclass(frozen=True, slots=True)
class InstructionFailed:
    """The server could not carry out an instruction."""

    id: str
    error: str


@dataclass(frozen=True, slots=True)
class SetQuorum:
    """An admin sets the run's `min_clients`."""

    min_clients: int
    by: str


@dataclass(frozen=True, slots=True)
class AddTargets:
    """An admin has more sites join the run; `order` is their signed start, base64."""

    sites: tuple[str, ...]
    order: str
    by: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """An admin ends the run at some sites only; at all that are left, it ends the run."""

    sites: tuple[str, ...]
    by: str
    reason: str = "aborted"


@dataclass(frozen=True, slots=True)
class AbortTasks:
    """An admin gives up the open tasks of some sites; the sites stay in the run."""

    sites: tuple[str, ...]
    by: str


@dataclass(frozen=True, slots=True)
class Abort:
    """An admin ends the run."""

    by: str
    reason: str = "aborted"


Input: TypeAlias = (
    ResultArrived
    | FailureArrived
    | AnswerArrived
    | RosterChanged
    | TimerFired
    | Aggregated
    | InstructionFailed
    | SetQuorum
    | AddTargets
    | Withdraw
    | AbortTasks
    | Abort
)


# ---- instructions -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deploy:
    """Carry the signed start, base64, to a target that has not answered."""

    site: str
    order: str


@dataclass(frozen=True, slots=True)
class Offer:
    """Keep this task open to its site."""

    task: Task


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Compute the model of a closed round."""

    closed: RoundClosed

    @property
    def id(self) -> str:
        """Name of the instruction, stable over restarts."""
        return f"aggregate/{self.closed.round}"


@dataclass(frozen=True, slots=True)
class Wake:
    """Fire a timer once, `after_s` seconds from when this instruction first appears."""

    id: str
    after_s: float


Instruction: TypeAlias = Deploy | Offer | Aggregate | Wake
