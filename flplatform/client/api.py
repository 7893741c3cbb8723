"""What a job's code imports: tasks come in, results go out.

Two styles. Either the job's module has the functions

    def train(model, context) -> TrainResult
    def validate(model, context) -> ValidateResult

and the platform calls them; or the job is a script with a loop of its own:

    while (task := receive()) is not None:
        send(train(task) if task.kind == "train" else validate(task))

Both get the same: `model` is a dict of named NumPy arrays, mapped from the received file and
therefore **read-only** (writing raises NumPy's "assignment destination is read-only"); copy what
you change. Before each task `random` and NumPy's global generator are seeded with the task's
seed, which is also `context.seed`; other libraries are yours to seed.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.messages import check_examples, check_metrics
from flplatform.core.model import Array, Arrays, Manifest
from flplatform.files.modelfile import check_finite

__all__ = ["Context", "Task", "TrainResult", "ValidateResult", "receive", "send"]


class TrainResult(NamedTuple):
    """What training returns; a plain tuple of the same values will do.

    Attributes:
        model: every received tensor, with the dtype and shape in which it was received. If the
            job sends changes (`updates: delta`), the change of each; if it sends partial updates,
            any of them.
        examples: how many examples were trained on: the update's weight.
        metrics: finite numbers by name.
    """

    model: Arrays
    examples: int
    metrics: Mapping[str, float] = MappingProxyType({})


class ValidateResult(NamedTuple):
    """What validation returns; a plain tuple of the same values will do.

    Attributes:
        metrics: finite numbers by name, the job's watched metric among them.
        examples: how many examples the metrics were measured on.
    """

    metrics: Mapping[str, float]
    examples: int


@dataclass(frozen=True, slots=True)
class Context:
    """What a task is about.

    Attributes:
        run: the run's number.
        round: the round's number, from 1.
        seed: 63 bits, the same whenever this task is repeated.
        site: this site's name.
        args: `args` of `job.yml`.
        data: the site's datasets, by the names in `job.yml`: files or folders, read-only.
        state_dir: a folder of this run at this site. What a train task leaves there comes back in
            the next task once its result is accepted; what other tasks leave is dropped. Close
            its files before the task ends. Where several processes work on a task they share it.
        rank: which of the site's processes this is; what rank 0 returns is the result.
        world_size: how many of them work on the task together; mostly 1.
    """

    run: int
    round: int
    seed: int
    site: str
    args: Mapping[str, Any]
    data: Mapping[str, Path]
    state_dir: Path
    rank: int = 0
    world_size: int = 1

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Show a number to the operator while the task runs; it changes no model.

        Does nothing outside the process that a site runs, so that code can be tried alone, and
        nothing on a rank other than 0.

        Raises:
            InvalidArgumentError: the name is odd, the value is not a finite number, or the step
                is not an integer from 0 to 2**63 - 1.
        """
        number = check_metrics({name: _number(value, f"log_metric[{name!r:.60}]")}, "log_metric")
        count = None if step is None else _integer(step, "log_metric: step")
        if count is not None and not 0 <= count < 1 << 63:
            raise InvalidArgumentError("is not between 0 and 2**63 - 1", field="log_metric: step")
        if _session is not None:
            _session.log_metric(name, number[name], count)


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do for a script with its own loop.

    Attributes:
        kind: what to `send`: a `TrainResult` for "train", a `ValidateResult` for "validate".
        model: named arrays, read-only.
        context: what the task is about.
    """

    kind: Literal["train", "validate"]
    model: dict[str, Array]
    context: Context


class Session(Protocol):
    """How the platform answers `receive`, `send` and `log_metric` within a run process."""

    def receive(self) -> Task | None:
        """Wait for the next task."""

    def send(self, result: object) -> None:
        """Answer the task in hand."""

    def log_metric(self, name: str, value: float, step: int | None) -> None:
        """Pass a checked number on."""


_session: Session | None = None


def attach(session: Session | None) -> None:
    """Let `session` answer this module's functions; called by the platform alone."""
    global _session  # noqa: PLW0603 - user code calls plain functions; a process has one session
    _session = session


def receive() -> Task | None:
    """Wait for the next task; None once the run has ended.

    Raises:
        FailedPreconditionError: the task before has not been answered, or no site runs this code.
    """
    return _attached("receive").receive()


def send(result: TrainResult | ValidateResult | tuple[Any, ...]) -> None:
    """Answer the task that `receive` returned.

    Raises:
        FailedPreconditionError: there is no task to answer, or no site runs this code.
        InvalidArgumentError: the result is not what the task's kind asks for; names the field.
        ModelFormatError: a tensor is missing, unknown, has another dtype or shape, or holds NaN
            or infinity; names the tensor. The task has then failed.
    """
    _attached("send").send(result)


def check_train(result: object, expected: Manifest, *, partial: bool = False) -> TrainResult:
    """Return what training gave with plain types, if it fits the model it started from.

    Args:
        result: what the user's code returned.
        expected: the tensors of the model that training started from.
        partial: whether tensors may be missing, but not all.

    Raises:
        InvalidArgumentError: not a TrainResult, or a field of the wrong type; names the field.
        ModelFormatError: a tensor is missing, unknown, of another dtype or shape, or not finite.
    """
    if not isinstance(result, tuple) or isinstance(result, ValidateResult):
        raise _wrong_type("train", "TrainResult(model, examples, metrics)", result)
    if len(result) not in (2, 3):
        raise _wrong_type("train", "TrainResult(model, examples, metrics)", result)
    model, examples, metrics = (*result, {})[:3]
    if not isinstance(model, Mapping) or not all(isinstance(name, str) for name in model):
        raise InvalidArgumentError("is not a dict of named NumPy arrays", field="train: model")
    check = expected.check_part if partial else expected.check_same
    check(Manifest.of(model), "model")
    check_finite(model, "model")
    return TrainResult(model, _examples(examples, "train"), _metrics(metrics, "train"))


def check_validate(result: object, watched: str = "") -> ValidateResult:
    """Return what validation gave with plain types.

    Args:
        result: what the user's code returned.
        watched: a metric that must be among the metrics, if any.

    Raises:
        InvalidArgumentError: not a ValidateResult, a field of the wrong type, or the watched
            metric is missing; names the field.
    """
    if not isinstance(result, tuple) or isinstance(result, TrainResult) or len(result) != 2:
        raise _wrong_type("validate", "ValidateResult(metrics, examples)", result)
    metrics = _metrics(result[0], "validate")
    if watched and watched not in metrics:
        raise InvalidArgumentError(
            f"there is no {watched!r}, which the job watches; returned: {', '.join(metrics)}",
            field="validate: metrics",
        )
    return ValidateResult(metrics, _examples(result[1], "validate"))


def _attached(name: str) -> Session:
    if _session is None:
        raise FailedPreconditionError(
            f"{name}() works only in a script that a site runs",
            hint="submit the job, or call your own functions with a Context to try them",
        )
    return _session


def _wrong_type(kind: str, wanted: str, result: object) -> InvalidArgumentError:
    given = f"a tuple of {len(result)}" if type(result) is tuple else type(result).__name__
    return InvalidArgumentError(f"must return {wanted}, returned {given}", field=kind)


def _metrics(metrics: object, kind: str) -> dict[str, float]:
    field = f"{kind}: metrics"
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise InvalidArgumentError("is not a dict of numbers by name", field=field)
    numbers = {name: _number(value, f"{field}[{name!r:.60}]") for name, value in metrics.items()}
    return check_metrics(numbers, field)


def _examples(value: object, kind: str) -> int:
    field = f"{kind}: examples"
    return check_examples(_integer(value, field), field)


def _integer(value: Any, field: str) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise InvalidArgumentError(f"is a {type(value).__name__}, not an integer", field=field)


def _number(value: Any, field: str) -> float:
    """Take whatever calls itself a number: Python's, NumPy's, a framework's scalar."""
    if hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: torch's
            pass
    raise InvalidArgumentError(f"is a {type(value).__name__}, not a number", field=field)
