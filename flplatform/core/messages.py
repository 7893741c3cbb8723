"""What travels between server, site and run process, as plain values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from flplatform.core.errors import InvalidArgumentError

TRAIN = "train"
SUBMIT_MODEL = "submit_model"
VALIDATE = "validate."
GLOBAL_OWNER = "global"
"""Model owner name of the best global model in cross-site validation."""
LAST_OWNER = "last"
"""Model owner name of the last global model, scored by a closing task."""

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,8})\Z", re.ASCII)
RESERVED_SITE_NAMES = frozenset({"server", "client", "all", "global", "last", "admin"})

MAX_METRICS = 200
MAX_METRIC_NAME_CHARS = 100
MAX_EXAMPLES = 1 << 40


@dataclass(frozen=True, slots=True, order=True)
class TaskId:
    """`run/round/kind/site`: at most one accepted result ever carries it."""

    run: int
    round: int
    kind: str
    site: str

    def __str__(self) -> str:
        return f"{self.run}/{self.round}/{self.kind}/{self.site}"

    @classmethod
    def parse(cls, text: str) -> "TaskId":
        """Parse `run/round/kind/site`.

        Raises:
            InvalidArgumentError: the text is not a task id.
        """
        parts = text.split("/")
        if len(text) <= 300 and len(parts) == 4 and all(map(_NUMBER.match, parts[:2])):
            run, number, kind, site = parts
            owner = kind.removeprefix(VALIDATE)
            named = kind in (TRAIN, SUBMIT_MODEL) or (owner != kind and SITE_NAME.match(owner))
            if named and SITE_NAME.match(site):
                return cls(int(run), int(number), kind, site)
        raise InvalidArgumentError(f"{text[:100]!r} is not run/round/kind/site", field="task_id")

    @property
    def owner(self) -> str:
        """Owner of the model that a validate task measures, `` for other kinds."""
        return self.kind[len(VALIDATE) :] if self.kind.startswith(VALIDATE) else ""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A blob that holds a model: digest and size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Task:
    """Work offered to one site until it has a result, a failure, or is withdrawn.

    Attributes:
        model: what the task is about; its identity, however it crosses the wire.
        codec: train only: how the update is sent; `none` for an exact model file.
        wire: the model as it is downloaded, if not as `model`.
        wire_codec: what `wire` was encoded by.
    """

    id: TaskId
    seed: int
    model: ModelRef | None = None
    codec: str = "none"
    wire: ModelRef | None = None
    wire_codec: str = "none"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a site answers to a task; weights travel as a blob, named here by digest.

    Attributes:
        blob: the trained or submitted model; None for validation.
        examples: number of examples behind `metrics`, and the update's weight.
        metrics: what training or validation reported.
        received: train only: metrics of the *received* model on this site's data.
        received_examples: number of examples behind `received`.
        trained_from: train only: digest of the model the update was trained from.
        wire: train only: digest of the bytes that came, if a codec made them.
    """

    blob: ModelRef | None
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    received: Mapping[str, float] = field(default_factory=dict)
    received_examples: int = 0
    trained_from: str = ""
    wire: str = ""


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """Why a site could not do a task: one line, and the traceback of the user's code."""

    error: str
    traceback: str = ""


def task_seed(job_seed: int, round_number: int, kind: str, site: str) -> int:
    """Return the 63-bit seed of a task: the same in every run of the same job."""
    text = f"{job_seed}/{round_number}/{kind}/{site}"
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def check_metrics(metrics: Mapping[str, float], what: str = "metrics") -> dict[str, float]:
    """Return the metrics as a dict if count, names and values are within bounds.

    Raises:
        InvalidArgumentError: too many, an odd name, NaN or infinity.
    """
    if len(metrics) > MAX_METRICS:
        raise InvalidArgumentError(f"has {len(metrics)} entries; at most {MAX_METRICS}", field=what)
    for name, value in metrics.items():
        where = f"{what}[{name[:MAX_METRIC_NAME_CHARS]!r}]"
        if not name or len(name) > MAX_METRIC_NAME_CHARS or not name.isprintable():
            raise InvalidArgumentError(
                f"a name has 1 to {MAX_METRIC_NAME_CHARS} printable characters", field=where
            )
        if not abs(value) < float("inf"):
            raise InvalidArgumentError(f"is {value}, not a finite number", field=where)
    return dict(metrics)


def check_examples(examples: int, what: str = "examples") -> int:
    """Return `examples` if it lies between 0 and the cap.

    Raises:
        InvalidArgumentError: it does not.
    """
    if not 0 <= examples <= MAX_EXAMPLES:
        raise InvalidArgumentError(f"{examples} is not between 0 and {MAX_EXAMPLES}", field=what)
    return examples
