"""A job: a folder with `job.yml` and `code/`, packed and signed into one blob."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flplatform.core.config import Component, Name
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import RESERVED_SITE_NAMES, SITE_NAME
from flplatform.core.strict import Strict, parse_yaml

JOB_FILE = "job.yml"
CODE_FOLDER = "code"
MODEL_FILE = "model.safetensors"
"""Name of the initial model inside a packed job."""

Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
Step = Literal["scatter_gather", "cross_site_validation"]
DownCodec = Literal["none", "zstd", "bf16", "bf16+zstd", "fp16", "fp16+zstd"]
UpCodec = Literal[DownCodec, "int8", "int8+zstd"]

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*\Z")


class ExecutorSpec(Strict):
    """How a site runs the job: a module with `train` and `validate`, or a script that loops."""

    module: str = ""
    script: str = ""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if bool(self.module) == bool(self.script):
            raise ValueError("give exactly one of module (functions) and script (a loop)")
        if self.module and not _MODULE.match(self.module):
            raise ValueError(f"module {self.module!r} is not a dotted Python name")
        if self.script and (".." in self.script.split("/") or self.script.startswith("/")):
            raise ValueError(f"script {self.script!r} must be a path inside {CODE_FOLDER}/")
        return self


class Watch(Strict):
    """The metric that decides which model is best; ties keep the earlier one."""

    metric: str
    mode: Literal["max", "min"] = "max"

    def better(self, score: float, than: float) -> bool:
        """Return whether `score` beats `than` strictly."""
        return score > than if self.mode == "max" else score < than


class InitialModel(Strict):
    """Where round 1 starts: a file of the job, a function of its code, or another run's model."""

    file: str = ""
    function: str = ""
    run: Annotated[int, Field(ge=0)] = 0
    round: Annotated[int, Field(ge=0)] | Literal["best", "last"] = "best"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(map(bool, (self.file, self.function, self.run))) != 1:
            raise ValueError("give exactly one of file, function and run")
        if ".." in self.file.split("/") or self.file.startswith("/"):
            raise ValueError(f"file {self.file!r} must be a path inside the job")
        if self.function and not _FUNCTION.match(self.function):
            raise ValueError(f"function {self.function!r} is not module:name")
        return self


class JobSpec(Strict):
    """The contents of `job.yml`."""

    name: Name
    description: str = ""
    workflow: Annotated[tuple[Step, ...], Field(min_length=1, max_length=10)] = (
        "scatter_gather",
        "cross_site_validation",
    )
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    min_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    wait_after_min_s: Annotated[float, Field(ge=0, le=30 * 86400)] = 10.0
    round_deadline_s: Seconds = 600.0
    on_deadline: Literal["extend", "abort"] = "extend"
    deploy_wait_s: Seconds = 60.0
    quorum_wait_s: Seconds = 3600.0
    validate_deadline_s: Seconds = 600.0
    aggregator: Component = Component(name="weighted_mean")
    optimizer: Component | None = None
    updates: Literal["full", "delta"] = "full"
    partial_updates: bool = False
    codec: UpCodec = "none"
    codec_down: DownCodec = "none"
    data: tuple[Name, ...] = ()
    environment: Name = "default"
    executor: ExecutorSpec
    args: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    watch: Watch | None = None
    initial_model: InitialModel
    keep_updates: Literal["last 2", "all", "none"] = "last 2"

    @field_validator("data", "workflow")
    @classmethod
    def _unique(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names an entry twice")
        return value


def parse_job(text: str, source: str = JOB_FILE) -> JobSpec:
    """Parse `job.yml`.

    Raises:
        ConfigError: with every problem found, each with its line and key path.
    """
    return parse_yaml(JobSpec, text, source)


def check_targets(sites: tuple[str, ...], min_clients: int) -> None:
    """Refuse targets that cannot make a run.

    Raises:
        InvalidArgumentError: no site, an odd name, a double one, or fewer than `min_clients`.
    """
    if not sites:
        raise InvalidArgumentError("names no site", field="sites")
    for site in sites:
        if not SITE_NAME.match(site) or site in RESERVED_SITE_NAMES:
            raise InvalidArgumentError(f"{site[:80]!r} is not a site name", field="sites")
    if len(set(sites)) != len(sites):
        raise InvalidArgumentError("names a site twice", field="sites")
    if min_clients > len(sites):
        raise InvalidArgumentError(
            f"is {min_clients}, but the run has only {len(sites)} target sites",
            field="min_clients",
            hint="lower it with --min or target more sites",
        )
