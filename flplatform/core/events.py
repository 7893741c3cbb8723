"""The events of a run and of the federation: what was decided, in the order it was decided.

A row's `type` and `version` name the class here. A changed shape is a new version plus a pure
upcaster in `UPCASTERS`; nothing here is ever edited in place once released.
"""

import json
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from flplatform.core.errors import DataLossError, FailedPreconditionError
from flplatform.core.job import JobSpec
from flplatform.core.strict import Strict

FEDERATION = "federation"
"""Name of the federation's own stream."""


def run_stream(run: int) -> str:
    """Return the name of a run's stream."""
    return f"run/{run}"


class Event(Strict):
    """Base of all events."""

    version: ClassVar[int] = 1


class Blob(Strict):
    """A model blob by digest and size in bytes."""

    digest: str
    size: int


class SourceModel(Blob):
    """A model of an earlier run that a run validates.

    `best` and `latest` are global models of that moment, `round` is a chosen one; `local` is a
    site's best local model, `update` what the site sent for a round.
    """

    kind: Literal["best", "latest", "round", "local", "update"]
    round: int


class Target(Strict):
    """One contribution to a closed round, as aggregation reads it."""

    site: str
    digest: str
    size: int
    weight: float


# ---- federation ---------------------------------------------------------------------------------


class RunNumbered(Event):
    """A submission was accepted and got its run number."""

    run: int
    submission_id: str
    job_digest: str
    job_name: str
    submitter: str
    organisation: str = ""
    source_run: int = 0
    """Of a validation on demand: the run whose models it validates."""


class RunSummarised(Event):
    """A run has ended: what a list of runs shows, so that ended runs need no replay."""

    run: int
    status: str
    reason: str
    round: int
    rounds: int


class RunDeleted(Event):
    """An admin deleted an ended run: its blobs are freed, its number and its stream stay."""

    run: int
    by: str


class SiteEnabled(Event):
    """An admin let a site take part again."""

    site: str
    by: str


class SiteDisabled(Event):
    """An admin barred a site from taking part."""

    site: str
    by: str


class NameRevoked(Event):
    """An admin denied a name any part in the federation, or undid that."""

    name: str
    kind: Literal["site", "admin"]
    order: str
    """The signed denial, base64: sites verify it, the server carries it."""
    by: str
    undo: bool = False


class JobStaged(Event):
    """A packed job lies on the server under a name, in place of whatever had that name."""

    name: str
    job: JobSpec
    job_blob: Blob
    model: Blob
    parameters: int
    has_code: bool
    by: str
    organisation: str


class JobUnstaged(Event):
    """A staged job was given up; runs that it was deployed for keep it."""

    name: str
    by: str


class RunReserved(Event):
    """A run number was taken for a run that is prepared step by step."""

    run: int
    submission_id: str
    """What the start order of this run must carry, so that starting twice is starting once."""
    by: str
    organisation: str


class RunPrepared(Event):
    """A staged job was deployed for a reserved run; the sites are all that have accepted it."""

    run: int
    job_name: str
    job_blob: Blob
    model: Blob
    sites: tuple[str, ...]
    by: str


# ---- run ----------------------------------------------------------------------------------------


class RunOpened(Event):
    """The first event of every run: everything that a restart must know."""

    run: int
    job: JobSpec
    job_blob: Blob
    submission_id: str
    submitter: str
    submitter_organisation: str
    order: str
    """The signed start order, base64: sites verify it, the server only carries it."""
    sites: tuple[str, ...]
    min_clients: int
    initial_model: Blob
    wire: Blob | None = None
    """The initial model as sites download it, if the job has `codec_down`."""
    source_run: int = 0
    """Of a validation on demand: the run whose models it validates."""
    source_round: int = 0
    """The last round that the source run had opened."""
    source_models: dict[str, SourceModel] = {}
    """Model owner → model to validate."""
    source_gaps: dict[str, str] = {}
    """Model owner → why there is no model of it."""


class SiteAnswered(Event):
    """A target accepted or declined the run; a refusal names its rule."""

    site: str
    accepted: bool
    rule: str = ""
    reason: str = ""
    isolation: str = ""


class SiteWithdrawn(Event):
    """An admin ended the run at one site: it takes no part any more, what it gave stays."""

    site: str
    by: str
    reason: str


class TargetsAdded(Event):
    """Sites joined the run: new ones, or such that had declined or were withdrawn."""

    sites: tuple[str, ...]
    order: str
    """The signed start order that these sites verify, base64."""
    by: str


class DeployWaitOver(Event):
    """`deploy_wait_s` passed: round 1 need not wait for silent targets any more."""


class StepStarted(Event):
    """The workflow went on to its next step."""

    index: int
    step: str


class RoundOpened(Event):
    """A round opened with frozen participants."""

    round: int
    participants: tuple[str, ...]
    model: Blob


class UpdateAccepted(Event):
    """A train task has its one result."""

    task_id: str
    site: str
    round: int
    digest: str
    size: int
    examples: int
    metrics: dict[str, float] = {}
    received: dict[str, float] = {}
    received_examples: int = 0
    wire: str = ""
    """Digest of the bytes that came, if a codec made them."""


class ResultAccepted(Event):
    """A validate or submit_model task has its one result."""

    task_id: str
    site: str
    digest: str = ""
    size: int = 0
    examples: int = 0
    metrics: dict[str, float] = {}


class TaskFailed(Event):
    """A task has failed for good at its site."""

    task_id: str
    site: str
    error: str
    traceback: str = ""


class DeadlineExtended(Event):
    """The round's deadline passed below quorum and was extended, once."""

    round: int


class RoundClosed(Event):
    """Everything that aggregation reads; the published model is a function of this alone."""

    round: int
    reason: str
    contributions: tuple[Target, ...]
    stragglers: tuple[str, ...]
    base: Blob
    optimizer_state: Blob | None = None
    aggregator: str
    aggregator_args: dict[str, Any]
    updates: Literal["full", "delta"] = "full"
    optimizer: str = ""
    optimizer_args: dict[str, Any] = {}


class ModelPublished(Event):
    """The global model of a round is durable, and its optimiser's state if it has one."""

    round: int
    model: Blob
    optimizer_state: Blob | None = None
    wire: Blob | None = None
    """The model as sites download it for training, if the job has `codec_down`."""


class ModelScored(Event):
    """The global model of a round has its score: the watched metric, averaged by examples."""

    round: int
    score: float
    examples: int
    best: bool


class GatherOpened(Event):
    """Tasks without a quorum were opened: score the last model, collect or validate models."""

    stage: Literal["score", "submit", "validate"]
    round: int
    participants: tuple[str, ...]
    models: dict[str, Blob]
    """Model owner → model to validate; empty for `submit`."""


class GatherClosed(Event):
    """The tasks of a gathering are settled, or its deadline passed."""

    stage: Literal["score", "submit", "validate"]
    reason: str
    gaps: dict[str, str]
    """Task id → why it has no result."""


class QuorumSet(Event):
    """An admin changed the run's `min_clients`."""

    min_clients: int
    by: str


class RunEnded(Event):
    """The one terminal event."""

    status: Literal["finished", "failed", "aborted"]
    reason: str
    by: str = ""


EVENTS: dict[tuple[str, int], type[Event]] = {
    (cls.__name__, cls.version): cls
    for cls in (
        RunNumbered, RunSummarised, RunDeleted, SiteEnabled, SiteDisabled, NameRevoked, RunOpened,
        SiteAnswered,
        DeployWaitOver, StepStarted, RoundOpened, UpdateAccepted, ResultAccepted, TaskFailed,
        DeadlineExtended, RoundClosed, ModelPublished, ModelScored, GatherOpened, GatherClosed,
        QuorumSet, RunEnded, SiteWithdrawn, TargetsAdded,
        JobStaged, JobUnstaged, RunReserved, RunPrepared,
    )
}  # fmt: skip
"""Every type and version that this release reads."""

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]] = {}
"""(type, old version) → pure function from the old body to (new version, new body)."""


def encode(event: Event) -> tuple[str, int, str]:
    """Return type, version and JSON body of an event."""
    return type(event).__name__, event.version, event.model_dump_json()


def decode(type_name: str, version: int, body: str, where: str) -> Event:
    """Read one stored event, upcasting older versions.

    Raises:
        FailedPreconditionError: this release does not know the type or version; the run opens
            read-only.
        DataLossError: the body does not have the declared shape.
    """
    while (type_name, version) in UPCASTERS:
        version, fields = UPCASTERS[type_name, version](json.loads(body))
        body = json.dumps(fields)
    cls = EVENTS.get((type_name, version))
    if cls is None:
        raise FailedPreconditionError(
            f"{where} holds event {type_name} version {version}, unknown to this release",
            hint="open this state with the newer release that wrote it",
        )
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        raise DataLossError(f"{where} does not hold a {type_name}: {error}") from None
