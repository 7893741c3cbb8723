"""Steps towards a run in memory: what `FakeControl` has as `staging`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flplatform.core.errors import FailedPreconditionError
from flplatform.core.messages import ModelRef
from flplatform.core.staging import PREPARED, StagedJob, StartPlan
from tests.support.workflows import job


def staged(name: str = "heart", **changes: Any) -> StagedJob:
    """A job that amy has staged."""
    found = StagedJob(
        name=name,
        job=job(name="heart", data=["heart"]),
        package=ModelRef("blake3:" + "1" * 64, 1000),
        model=ModelRef("blake3:" + "2" * 64, 56),
        parameters=14,
        has_code=True,
        by="amy",
        organisation="hub",
        staged="2024-05-01T12:04:10.123Z",
    )
    return replace(found, **changes)


def plan(run: int = 7, **changes: Any) -> StartPlan:
    """A prepared run with heart deployed at a and b."""
    found = StartPlan(
        run=run,
        status=PREPARED,
        job_name="heart",
        package=ModelRef("blake3:" + "1" * 64, 1000),
        submission_id="5" * 32,
        sites=("a", "b"),
    )
    return replace(found, **changes)


@dataclass
class FakeStaging:
    """Implements `core.staging.StagingControl`; tests set the fields and read the calls.

    Attributes:
        staged: jobs by name.
        plans: what a start of a run would be about.
        calls: everything that changes anything.
    """

    staged: dict[str, StagedJob] = field(default_factory=dict)
    plans: dict[int, StartPlan] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    refusal: Exception | None = None

    def jobs(self) -> Mapping[str, StagedJob]:
        return self.staged

    def _note(self, *call: Any) -> None:
        if self.refusal:
            raise self.refusal
        self.calls.append(call)

    async def stage(self, name: str, digest: str, by: str, organisation: str) -> StagedJob:
        self._note("stage", name, digest, by, organisation)
        self.staged[name] = staged(name, by=by, organisation=organisation)
        return self.staged[name]

    async def unstage(self, name: str, by: str) -> None:
        self._note("unstage", name, by)
        del self.staged[name]

    async def reserve(self, number: int, by: str, organisation: str) -> None:
        self._note("reserve", number, by, organisation)

    async def deploy(self, number: int, name: str, sites: Sequence[str], by: str) -> StartPlan:
        self._note("deploy", number, name, tuple(sites), by)
        self.plans[number] = plan(number, job_name=name, sites=tuple(sites))
        return self.plans[number]

    def plan(self, number: int) -> StartPlan:
        if number not in self.plans:
            raise FailedPreconditionError(f"nothing is deployed for run {number}")
        return self.plans[number]

    async def begin(
        self, number: int, order: bytes, submitter: str, min_clients: int | None
    ) -> None:
        self._note("begin", number, order, submitter, min_clients)
