"""Validation on demand: models of a run, measured again at sites, as a run of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flplatform.core.events import SourceModel
from flplatform.core.messages import ModelRef


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which models to validate, and where.

    Attributes:
        owners: model owners: sites, `global` (the best model, while the run goes on the latest),
            `best`, `last` and `rN` (the global model of a round); the global model and those of
            all sites if empty.
        sites: data sites; all of the source run if empty.
    """

    owners: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ValidationPlan:
    """What a validation would be about, if it began now.

    Attributes:
        run: the source run.
        status: the source run's.
        round: the last round that the source run opened.
        rounds: how many it has.
        package: the source run's signed package; the same code validates.
        author, author_organisation, author_role: who packed it.
        has_code: whether it brings code.
        models: model owner -> model.
        gaps: model owner -> why there is no model of it.
        sites: where they would be validated.
        left_out: site of the source run -> why not there.
        data: datasets that the job wants.
        environment: environment that the job wants.
        deadline_s: how long the sites have.
    """

    run: int
    status: str
    round: int
    rounds: int
    job_name: str
    package: ModelRef
    author: str
    author_organisation: str
    author_role: str
    has_code: bool
    models: Mapping[str, SourceModel]
    gaps: Mapping[str, str]
    sites: tuple[str, ...]
    left_out: Mapping[str, str]
    data: tuple[str, ...]
    environment: str
    deadline_s: float


class ValidationControl(Protocol):
    """Validation on demand."""

    async def plan(self, number: int, wanted: Wanted) -> ValidationPlan:
        """Return what a validation of a run would be about.

        Raises:
            NotFoundError: no such run, or it was deleted.
            InvalidArgumentError: no such model owner or site.
            FailedPreconditionError: there is no model to validate.
            FLError: the run's log or its package cannot be used, and why.
        """

    async def open(self, number: int, order: bytes, submitter: str, wanted: Wanted) -> int:
        """Open a run that validates models of run `number`; the same submission is opened once.

        Args:
            number: the source run.
            order: a start order for the source run's job, its purpose `validate`; its sites are
                the data sites.
            submitter: the session's user, who must have signed it.
            wanted: the models; its sites do not matter here.

        Raises:
            FLError: the order or a site is refused, or as `plan`.
        """
