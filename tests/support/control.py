"""A federation in memory: what operators see and do, without a server behind it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from flplatform.core.access import DenialView
from flplatform.core.control import (
    MatrixView,
    RoundMetrics,
    RunView,
    ServerView,
    SiteReply,
    SiteView,
)
from flplatform.core.diagnosis import Diagnosis
from flplatform.core.errors import FailedPreconditionError, NotFoundError
from flplatform.core.lineage import Lineage, Verified
from flplatform.core.messages import ModelRef
from tests.support.files import FakeFiles
from tests.support.logs import FakeLogs, FakeStats
from tests.support.staging import FakeStaging
from tests.support.validation import FakeValidations


def site(name: str, organisation: str = "", **changes: Any) -> SiteView:
    """A live site whose organisation has its name, unless told otherwise."""
    view = SiteView(
        name=name,
        organisation=organisation or name,
        state="live",
        runs=(),
        last_seen_s=0.4,
        certificate_days=341.2,
        isolation="sandbox",
        version="0.1",
    )
    return replace(view, **changes)


def run(number: int, **changes: Any) -> RunView:
    """A run in its seventh round."""
    view = RunView(
        run=number,
        name="heart",
        submitter="amy",
        submitted="2024-05-01T12:04:10.123Z",
        status="training",
        reason="",
        ended="",
        round=7,
        rounds=20,
        min_clients=2,
        targets=("a", "b"),
        waiting=("b",),
        accepted=("a",),
        answers={"a": "ok", "b": "ok"},
        model_digest="blake3:" + "5" * 64,
        submitter_organisation="hub",
        metric="accuracy",
        phase="round",
        results=1,
    )
    return replace(view, **changes)


ENDED = {"status": "finished", "ended": "2024-05-01T13:00:00.000Z", "reason": "all steps done"}


@dataclass
class FakeAccess:
    """Implements `core.access.AccessControl`; it believes every order."""

    views: list[DenialView] = field(default_factory=list)
    certificates: dict[str, datetime] = field(default_factory=dict)
    replies: dict[str, SiteReply] = field(default_factory=dict)
    orders: list[tuple[bytes, str]] = field(default_factory=list)
    carried: list[tuple[str, ...]] = field(default_factory=list)
    outcome: tuple[str, str, bool] = ("site", "a", False)
    refusal: Exception | None = None

    def denials(self) -> list[DenialView]:
        return self.views

    def denied(self, kind: str, name: str, organisation: str) -> DenialView | None:
        found = (each for each in self.views if (each.kind, each.name) == (kind, name))
        return next((each for each in found if each.organisation in ("", organisation)), None)

    async def deny(self, order: bytes, signer: str) -> tuple[str, str, bool]:
        if self.refusal:
            raise self.refusal
        self.orders.append((order, signer))
        return self.outcome

    async def carry(self, sites: Sequence[str], timeout_s: float) -> dict[str, SiteReply]:
        self.carried.append(tuple(sites))
        silent = SiteReply("no_reply", message=f"no reply after {timeout_s:.1f} s")
        return {site: self.replies.get(site, silent) for site in sites}

    def site_certificates(self) -> Mapping[str, datetime]:
        return self.certificates


@dataclass
class FakeDiagnosis:
    """Implements `core.diagnosis.DiagnosisControl`: says what it was given."""

    answers: dict[str | int | tuple[int, int], Diagnosis] = field(default_factory=dict)

    def run(self, number: int) -> Diagnosis:
        if number not in self.answers:
            raise NotFoundError(f"there is no run {number}")
        return self.answers[number]

    def round(self, number: int, round_number: int) -> Diagnosis:
        return self.answers[number, round_number]

    def site(self, name: str) -> Diagnosis:
        unknown = Diagnosis(f"{name} has never registered with this server", "never_registered")
        return self.answers.get(name, unknown)


@dataclass
class FakeLineage:
    """Implements `core.lineage.LineageControl`."""

    answers: dict[int, Lineage] = field(default_factory=dict)
    verified: list[Verified] = field(default_factory=list)

    def lineage(self, number: int, round_number: int | None = None) -> Lineage:
        if number not in self.answers:
            raise NotFoundError(f"there is no run {number}")
        found = self.answers[number]
        wanted = tuple(
            each for each in found.rounds if round_number is None or each.round <= round_number
        )
        return replace(found, rounds=wanted)

    async def verify(self, number: int, rounds: tuple[int, ...]) -> AsyncIterator[Verified]:
        for each in self.verified:
            if each.round in rounds:
                yield each


@dataclass
class FakeLifecycle:
    """Implements `core.lifecycle.LifecycleControl`.

    Attributes:
        calls: everything that was done.
        tasks: site -> open tasks; a site without is refused.
        disabled: barred sites.
        views: deleted runs.
        on_withdraw: called after a withdrawal.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    disabled: set[str] = field(default_factory=set)
    views: list[RunView] = field(default_factory=list)
    on_withdraw: Callable[[], None] = lambda: None

    async def withdraw(self, number: int, sites: Sequence[str], by: str) -> None:
        self.calls.append(("withdraw", number, tuple(sites), by))
        self.on_withdraw()

    async def abort_task(self, number: int, site: str, by: str) -> tuple[str, ...]:
        if site not in self.tasks:
            raise FailedPreconditionError(f"{site} has no open task in run {number}")
        self.calls.append(("abort_task", number, site, by))
        return self.tasks[site]

    async def set_enabled(self, site: str, enabled: bool, by: str) -> bool:
        self.calls.append(("set_enabled", site, enabled, by))
        changed = enabled == (site in self.disabled)
        (self.disabled.discard if enabled else self.disabled.add)(site)
        return changed

    async def delete(self, number: int, by: str) -> None:
        self.calls.append(("delete", number, by))

    def deleted(self) -> list[RunView]:
        return self.views


@dataclass
class FakeControl:
    """Implements every Protocol of `core.control`; tests set the fields and read the logs.

    Attributes:
        replies: what each site answers; one that is missing is silent.
        asked: (sites, topic, signed) of every request that was relayed.
        orders: (order, submitter, min_clients) of every submission.
        calls: everything else that changes anything.
        loaded: the runs that were to be at hand.
        models: (run, round) -> blob.
    """

    run_views: dict[int, RunView] = field(default_factory=dict)
    site_views: list[SiteView] = field(default_factory=list)
    replies: dict[str, SiteReply] = field(default_factory=dict)
    rounds: dict[int, list[RoundMetrics]] = field(default_factory=dict)
    matrices: dict[int, MatrixView] = field(default_factory=dict)
    models: dict[tuple[int, int | str], ModelRef] = field(default_factory=dict)
    refusal: Exception | None = None
    asked: list[tuple[tuple[str, ...], str, bytes]] = field(default_factory=list)
    orders: list[tuple[bytes, str, int | None]] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    loaded: list[int] = field(default_factory=list)
    last_event: str = "run 3: round 7 opened with 2 sites"
    access: FakeAccess = field(default_factory=FakeAccess)
    staging: FakeStaging = field(default_factory=FakeStaging)
    logs: FakeLogs = field(default_factory=FakeLogs)
    stats: FakeStats = field(default_factory=FakeStats)
    files: FakeFiles = field(default_factory=FakeFiles)
    diagnosis: FakeDiagnosis = field(default_factory=FakeDiagnosis)
    lineage: FakeLineage = field(default_factory=FakeLineage)
    lifecycle: FakeLifecycle = field(default_factory=FakeLifecycle)
    validations: FakeValidations = field(default_factory=FakeValidations)

    def runs(self) -> list[RunView]:
        return [self.run_views[number] for number in sorted(self.run_views)]

    def run(self, number: int) -> RunView:
        if number not in self.run_views:
            raise NotFoundError(f"there is no run {number}", hint="list_runs shows the runs")
        return self.run_views[number]

    async def load(self, number: int) -> None:
        self.loaded.append(self.run(number).run)

    def active_runs(self) -> list[int]:
        return [view.run for view in self.runs() if not view.ended and view.status != "prepared"]

    async def submit(self, order: bytes, submitter: str, min_clients: int | None) -> int:
        if self.refusal:
            raise self.refusal
        self.orders.append((order, submitter, min_clients))
        number = max(self.run_views, default=0) + 1
        self.run_views[number] = run(number, submitter=submitter)
        return number

    def update(self, number: int, **changes: Any) -> None:
        """Change a run and wake who waits for it."""
        self.run_views[number] = replace(self.run_views[number], **changes)
        self.changed.set()
        self.changed = asyncio.Event()

    def _active(self, number: int) -> None:
        if self.run(number).ended:
            raise FailedPreconditionError(f"run {number} has ended", rule="run_ended")

    async def add_targets(self, number: int, order: bytes, submitter: str) -> None:
        self._active(number)
        self.calls.append(("add_targets", number, order, submitter))

    async def abort(self, number: int, by: str) -> None:
        self._active(number)
        self.calls.append(("abort", number, by))
        self.update(number, status="aborted", ended="now", reason=f"aborted by {by}")

    async def set_min_clients(self, number: int, min_clients: int, by: str) -> None:
        self._active(number)
        self.calls.append(("set_min_clients", number, min_clients, by))

    async def wait_ended(self, number: int) -> RunView:
        while not self.run(number).ended:
            await self.changed.wait()
        return self.run(number)

    async def wait_changed(self, number: int, seen: int) -> int:
        if not self.run(number).ended:
            await self.changed.wait()
        return seen + 1

    def metrics(self, number: int) -> list[RoundMetrics]:
        self.run(number)
        return self.rounds.get(number, [])

    def cross_validation(self, number: int) -> MatrixView:
        if number not in self.matrices:
            raise NotFoundError(f"there is no run {number}")
        return self.matrices[number]

    def model(self, number: int, which: int | str) -> tuple[int, ModelRef]:
        self.run(number)
        if (number, which) not in self.models:
            raise NotFoundError(f"run {number} has no global model of round {which}")
        return (which if isinstance(which, int) else 12), self.models[number, which]

    def sites(self) -> list[SiteView]:
        return self.site_views

    async def ask(
        self,
        sites: Sequence[str],
        topic: str,
        *,
        timeout_s: float,
        signed: bytes = b"",
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, SiteReply]:
        del body
        self.asked.append((tuple(sites), topic, signed))
        silent = SiteReply("no_reply", message=f"no reply after {timeout_s:.1f} s")
        return {name: self.replies.get(name, silent) for name in sites}

    def remove(self, site: str) -> None:
        if site not in {view.name for view in self.site_views if view.state != "expected"}:
            raise NotFoundError(f"{site} is not registered")
        self.calls.append(("remove", site))

    def server(self) -> ServerView:
        return ServerView(
            project="heart",
            name="server",
            version="0.1",
            state="serving",
            uptime_s=60.0,
            max_clients=10,
            registered=len(self.site_views),
            certificate_days=341.2,
            last_event=self.last_event,
        )

    def stop(self, *, restart: bool) -> None:
        self.calls.append(("stop", restart))

    def system(self) -> Mapping[str, Any]:
        return {"host": "hub", "cpus": 4, "load": 0.5, "uptime_s": 60.0}
