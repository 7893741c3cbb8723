"""Steps towards a run: staged jobs, reserved numbers, deployments, and the start at last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flplatform.core.control import RunView
from flplatform.core.errors import FailedPreconditionError
from flplatform.core.job import JobSpec
from flplatform.core.messages import ModelRef

PREPARED = "prepared"
"""Status of a run that has a number and has not begun."""

FURTHEST = 1000
"""How far beyond the last run number one can be reserved: a slip must not use them up."""


@dataclass(frozen=True, slots=True)
class StagedJob:
    """A packed job on the server.

    Attributes:
        name: what it was staged as.
        package: the signed package.
        model: the initial model.
        parameters: of the model.
        by, organisation: who staged it.
        staged: when, UTC.
    """

    name: str
    job: JobSpec
    package: ModelRef
    model: ModelRef
    parameters: int
    has_code: bool
    by: str
    organisation: str
    staged: str


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What a start of a run is about.

    Attributes:
        status: `prepared`, or that of a run at work.
        job_name: what the job was staged as, or the job's own name for a run at work.
        package: the signed package.
        submission_id: what the start order of a prepared run must carry, so that starting twice
            is starting once; sites that join a run at work are started by orders of their own.
        sites: where a prepared run is deployed; targets of a run at work.
        taking_part: those of them that need not be started: they have accepted, or are asked.
    """

    run: int
    status: str
    job_name: str
    package: ModelRef
    submission_id: str
    sites: tuple[str, ...]
    taking_part: tuple[str, ...] = ()


class StagingControl(Protocol):
    """Steps towards a run."""

    def jobs(self) -> Mapping[str, StagedJob]:
        """Return the staged jobs by name, in name order."""

    async def stage(self, name: str, digest: str, by: str, organisation: str) -> StagedJob:
        """Keep an uploaded package and its model under a name; the same again changes nothing.

        Raises:
            FLError: something was not uploaded, or the package or its model is refused, and why.
        """

    async def unstage(self, name: str, by: str) -> None:
        """Give up a staged job; runs that it was deployed for keep it.

        Raises:
            NotFoundError: no job is staged under this name.
        """

    async def reserve(self, number: int, by: str, organisation: str) -> None:
        """Take a run number; nothing changes if it is that of a prepared run.

        Raises:
            FailedPreconditionError: it was given before, or lies too far ahead.
        """

    async def deploy(self, number: int, name: str, sites: Sequence[str], by: str) -> StartPlan:
        """Note sites that accept a staged job, besides those that did before.

        Another package than the one deployed before begins anew.

        Raises:
            NotFoundError: there is no such run or job.
            FailedPreconditionError: the run has begun.
        """

    def plan(self, number: int) -> StartPlan:
        """Return what a start would be about.

        Raises:
            NotFoundError: there is no such run.
            FailedPreconditionError: nothing is deployed for it, or it has ended.
        """

    async def begin(
        self, number: int, order: bytes, submitter: str, min_clients: int | None
    ) -> None:
        """Open a prepared run, or add sites to one at work; the same order again changes nothing.

        Raises:
            FLError: the order, the package or the sites are refused, and why.
        """


def demand_prepared(run: RunView) -> None:
    """Refuse to prepare a run that has begun, and say what is legal now.

    Raises:
        FailedPreconditionError: it has.
    """
    if run.status == PREPARED:
        return
    if run.ended:
        raise FailedPreconditionError(
            f"run {run.run} has {run.status}",
            rule="run prepared",
            hint="set_run_number N takes a new number",
        )
    raise FailedPreconditionError(
        f"run {run.run} is {run.status}",
        rule="run prepared",
        hint="legal now: abort, set_min_clients, start client SITE",
    )


def not_begun(run: int) -> FailedPreconditionError:
    """Say what is legal for a prepared run, to who wants what needs a run at work."""
    return FailedPreconditionError(
        f"run {run} is {PREPARED}",
        rule="run begun",
        hint=f"legal now: deploy, start or delete_run_number {run}",
    )
