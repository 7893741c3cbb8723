"""Staged jobs and prepared runs, as the federation's log tells of them."""

from dataclasses import dataclass, replace

from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError
from flplatform.core.messages import ModelRef
from flplatform.core.staging import StagedJob, not_begun


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run with a number and no stream of its own yet.

    Attributes:
        submission_id: what its start order must carry.
        deployed: what is deployed, and where; None for nothing yet.
    """

    run: int
    submission_id: str
    deployed: ev.RunPrepared | None = None

    def check(self, opened: ev.RunOpened) -> None:
        """Refuse to begin with anything but what is deployed.

        Raises:
            FailedPreconditionError: another package, or a site that it is not deployed at.
        """
        deployed = self.deployed
        if opened.source_run:
            raise FailedPreconditionError(
                f"run {self.run} is prepared for training", rule="signed purpose"
            )
        if deployed is None or deployed.job_blob.digest != opened.job_blob.digest:
            raise FailedPreconditionError(
                f"another package is deployed for run {self.run}" if deployed
                else f"nothing is deployed for run {self.run}",
                hint="deploy JOB TARGET, then start again",
            )  # fmt: skip
        if missing := sorted(set(opened.sites) - set(deployed.sites)):
            raise FailedPreconditionError(
                f"{', '.join(missing)}: not deployed for run {self.run}",
                hint=f"deploy {deployed.job_name} client {' '.join(missing)}",
            )


class Shelf:
    """What lies ready. Pure: only `apply` changes it.

    Attributes:
        jobs: staged jobs by name.
        prepared: prepared runs by number.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, StagedJob] = {}
        self.prepared: dict[int, PreparedRun] = {}

    def apply(self, event: ev.Event, time: str) -> None:
        """Take in an event of the federation; those that are not about steps change nothing."""
        match event:
            case ev.JobStaged():
                self.jobs[event.name] = StagedJob(
                    name=event.name,
                    job=event.job,
                    package=ModelRef(event.job_blob.digest, event.job_blob.size),
                    model=ModelRef(event.model.digest, event.model.size),
                    parameters=event.parameters,
                    has_code=event.has_code,
                    by=event.by,
                    organisation=event.organisation,
                    staged=time,
                )
            case ev.JobUnstaged():
                self.jobs.pop(event.name, None)
            case ev.RunReserved():
                self.prepared[event.run] = PreparedRun(event.run, event.submission_id)
            case ev.RunPrepared():
                self.prepared[event.run] = replace(self.prepared[event.run], deployed=event)
            case ev.RunNumbered() | ev.RunDeleted():
                self.prepared.pop(event.run, None)

    def of_submission(self, submission_id: str) -> PreparedRun | None:
        """Return the prepared run whose start carries this submission id, if there is one."""
        found = (each for each in self.prepared.values() if each.submission_id == submission_id)
        return next(found, None)

    def demand_begun(self, run: int) -> None:
        """Refuse what needs the events of a run that has none yet.

        Raises:
            FailedPreconditionError: the run is prepared.
        """
        if run in self.prepared:
            raise not_begun(run)

    def blobs(self) -> set[str]:
        """Return the digests of all packages and models that lie ready."""
        staged = {blob.digest for job in self.jobs.values() for blob in (job.package, job.model)}
        deployed = [run.deployed for run in self.prepared.values() if run.deployed]
        return staged | {blob.digest for each in deployed for blob in (each.job_blob, each.model)}
