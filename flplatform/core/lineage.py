"""How a global model came to be: values, and the Protocol behind the console's `lineage`."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Share:
    """One contribution to a round's model; `share` is its part of all weights, 0 to 1."""

    site: str
    share: float
    weight: float
    digest: str
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundLineage:
    """How one global model was made.

    Attributes:
        base: digest of the model that the round started from.
        base_round: the round of that model; 0 is the initial one.
        stragglers: participant without an update → why.
        optimizer: the server optimiser's name; empty without one.
        reason: why the round closed.
        model: digest of the published model; empty while it is being aggregated.
        score: the watched metric of the model; None if it was not scored.
        published: UTC, ISO 8601.
    """

    round: int
    base: str
    base_round: int
    shares: tuple[Share, ...]
    stragglers: Mapping[str, str]
    aggregator: str
    aggregator_args: Mapping[str, Any]
    reason: str
    optimizer: str = ""
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    score: float | None = None
    best: bool = False
    published: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """A model of an earlier run, from which another run started."""

    run: int
    round: int | None
    digest: str
    submitter: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """The models of a run, or one of them with its bases.

    Attributes:
        job: the job's name.
        job_digest: of the package that was signed.
        signer: who signed the start order, as its certificate says.
        initial_model: digest of model 0.
        initial_from: where model 0 came from, in words.
        origins: models of earlier runs behind model 0, the nearest first.
        rounds: oldest first.
    """

    run: int
    job: str
    job_digest: str
    submitter: str
    submitter_organisation: str
    signer: str
    submitted: str
    metric: str
    initial_model: str
    initial_from: str
    origins: tuple[Origin, ...]
    rounds: tuple[RoundLineage, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """One round aggregated again: `same`, `differs`, `freed` (an update is gone) or `error`."""

    round: int
    result: str
    digest: str = ""
    detail: str = ""


class LineageControl(Protocol):
    """Tells, and proves, where models come from."""

    def lineage(self, number: int, round_number: int | None = None) -> Lineage:
        """Return the models of a run, or one of them with the chain of its bases.

        Raises:
            NotFoundError: no such run, or no such model.
        """

    def verify(self, number: int, rounds: tuple[int, ...]) -> AsyncIterator[Verified]:
        """Aggregate closed rounds again and compare, one after the other.

        Raises:
            NotFoundError: no such run.
        """
