"""What a run process is given, what a task comes to, and how it may end instead."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flplatform.client.run_log import Listener
from flplatform.core.config import Environment, Isolation
from flplatform.core.errors import FailedPreconditionError, UnavailableError
from flplatform.core.job import ExecutorSpec, Watch
from flplatform.core.messages import TaskFailure


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to run, with which rights.

    Attributes:
        folder: the run process's own, emptied and filled by it.
        code: the unpacked code of the job.
        kit: hidden from the job's code at level `sandbox`, as are `folder`, `state` and `hidden`.
        log: file for what the code prints; the older part gets `.1` at its end.
        state: folder with the run's committed states, see `client.state`.
        data: files and folders by dataset name, shown read-only.
        environment_name: how the site calls it.
        processes: how many work on each task together; the environment's limits are those of each.
        isolation: the level to run under; refused if this host does not have it.
        max_state_bytes: most that the state may take.
        delta: whether training returns changes instead of models.
        partial: whether training may leave tensors out.
        on_lines: hears of every line of the log.
    """

    run: int
    site: str
    folder: Path
    code: Path
    kit: Path
    log: Path
    state: Path
    executor: ExecutorSpec
    args: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Path] = field(default_factory=dict)
    watch: Watch | None = None
    environment: Environment = Environment()
    environment_name: str = "default"
    processes: int = 1
    isolation: Isolation = "none"
    hidden: tuple[Path, ...] = ()
    max_state_bytes: int = 64 << 30
    delta: bool = False
    partial: bool = False
    on_lines: Listener = lambda *_: None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task came to; unchecked but for types and bounds.

    Attributes:
        file: name of the model in the task's work folder; None for validation. It may be
            replaced but not written, as the state may link it. A train task also leaves `state/`
            there, one of `client.state`.
        update: name of what is sent instead of that model, if the job sends changes or may leave
            tensors out.
        delta: whether `update` holds changes.
    """

    file: str | None
    examples: int
    metrics: Mapping[str, float]
    received: Mapping[str, float]
    received_examples: int
    update: str | None = None
    delta: bool = False


class RunProcessCrashed(UnavailableError):  # noqa: N818 - what happened, not what is wrong
    """The process has ended without an answer; `log_tail` holds the last lines it printed."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class JobCodeError(FailedPreconditionError):
    """The job's code cannot be loaded; `traceback` is that of the code."""

    def __init__(self, failure: TaskFailure) -> None:
        super().__init__(f"the job's code cannot be loaded: {failure.error}")
        self.traceback = failure.traceback
