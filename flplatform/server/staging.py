"""`Staging`: steps towards a run, for operators who take them one by one."""

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Protocol

from flplatform.core import events as ev
from flplatform.core.errors import (
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.core.staging import FURTHEST, PREPARED, StagedJob, StartPlan
from flplatform.files.modelfile import check_finite, load
from flplatform.security.identity import TrustStore
from flplatform.security.package import open_package
from flplatform.security.signing import Signed, StartOrder, open_order
from flplatform.server.runs import Runs

log = logging.getLogger(__name__)

UNUSED_S = 86_400.0
"""How long an upload is kept that nobody has staged or submitted."""

SWEEP_S = 3_600.0
"""Pause between two looks for such uploads."""


class Trusting(Protocol):
    """Holds the trust store of now."""

    store: TrustStore


Submit = Callable[[bytes, str, int | None], Awaitable[int]]
"""(signed order, submitter, min_clients) -> the run that it has opened, see `RunsControl`."""

AddTargets = Callable[[int, bytes, str], Awaitable[None]]
"""(run, signed order, submitter): has more sites join a run, see `RunsControl`."""


class Staging:
    """Implements `core.staging.StagingControl`; lives on the event loop.

    Args:
        trust: verifies packages and orders.
        runs: numbers and knows the runs.
        blobs: where packages and models are.
        submit: opens a run.
        add_targets: has sites join one.
    """

    def __init__(
        self,
        trust: Trusting,
        runs: Runs,
        blobs: BlobStore,
        submit: Submit,
        add_targets: AddTargets,
    ) -> None:
        self._trust = trust
        self._runs = runs
        self._blobs = blobs
        self._submit = submit
        self._add_targets = add_targets
        self._told = False

    # ---- jobs ----

    def jobs(self) -> Mapping[str, StagedJob]:
        """Return the staged jobs by name, in name order."""
        return dict(sorted(self._runs.shelf.jobs.items()))

    async def stage(self, name: str, digest: str, by: str, organisation: str) -> StagedJob:
        """Keep an uploaded package and its model under a name; the same again changes nothing.

        Raises:
            FLError: something was not uploaded, or the package or its model is refused, and why.
        """
        with self._runs.retention.hold(digest):
            self._demand_uploaded(digest, "package")
            path, now = self._blobs.path(digest), datetime.now(UTC)
            package = await asyncio.to_thread(open_package, path, self._trust.store, now)
            if package.author.name != by:
                raise PermissionDeniedError(
                    f"the package is signed by {package.author.name}, the session is {by}'s",
                    rule="own_package",
                )
            with self._runs.retention.hold(package.model.digest):
                self._demand_uploaded(package.model.digest, "initial model")
                staged = ev.JobStaged(
                    name=name,
                    job=package.job,
                    job_blob=ev.Blob(digest=digest, size=path.stat().st_size),
                    model=ev.Blob(digest=package.model.digest, size=package.model.size),
                    parameters=await asyncio.to_thread(self._parameters, package.model),
                    has_code=package.has_code,
                    by=by,
                    organisation=organisation,
                )
                await self._runs.step(lambda: None if self._is_staged(staged) else staged)
        log.info("job %s staged by %s", name, by)
        return self._runs.shelf.jobs[name]

    def _demand_uploaded(self, digest: str, what: str) -> None:
        if not self._blobs.has(digest):
            raise NotFoundError(f"the {what} was not uploaded", hint="upload_folder again")

    def _parameters(self, model: ModelRef) -> int:
        """Return a model's number of parameters, once it is known to be one that can be used."""
        path = self._blobs.path(model.digest)
        if path.stat().st_size != model.size:
            raise InvalidArgumentError(f"has not {model.size} bytes", field="model_size")
        arrays = load(path)
        check_finite(arrays, "initial model")
        return sum(array.size for array in arrays.values())

    def _is_staged(self, event: ev.JobStaged) -> bool:
        known = self._runs.shelf.jobs.get(event.name)
        return known is not None and known.package.digest == event.job_blob.digest

    async def unstage(self, name: str, by: str) -> None:
        """Give up a staged job; runs that it was deployed for keep it.

        Raises:
            NotFoundError: no job is staged under this name.
        """

        def decide() -> ev.Event:
            self._job(name)
            return ev.JobUnstaged(name=name, by=by)

        await self._runs.step(decide)
        log.info("job %s unstaged by %s", name, by)

    def _job(self, name: str) -> StagedJob:
        if name not in self._runs.shelf.jobs:
            raise NotFoundError(f"no job {name[:80]!r} is staged", hint="list_jobs shows them")
        return self._runs.shelf.jobs[name]

    # ---- runs ----

    async def reserve(self, number: int, by: str, organisation: str) -> None:
        """Take a run number; nothing changes if it is that of a prepared run.

        Raises:
            FailedPreconditionError: it was given before, or lies too far ahead.
        """

        def decide() -> ev.Event | None:
            if number in self._runs.shelf.prepared:
                return None
            self._demand_free(number)
            return ev.RunReserved(
                run=number,
                submission_id=secrets.token_hex(16),
                by=by,
                organisation=organisation,
            )

        await self._runs.step(decide)

    def _demand_free(self, number: int) -> None:
        summaries = {summary.run: summary for summary in self._runs.summaries()}
        last = self._runs.last
        hint = f"the next number is {last + 1}; list_runs shows the runs"
        if number in summaries:
            found = summaries[number]
            fate = f"was deleted by {found.deleted_by}" if found.deleted else f"is {found.status}"
            raise FailedPreconditionError(f"run {number} {fate}", rule="run number", hint=hint)
        if number <= last:
            raise FailedPreconditionError(
                f"there is no run {number}, and numbers below {last} are not given any more",
                rule="run number",
                hint=hint,
            )
        if number > last + FURTHEST:
            raise FailedPreconditionError(
                f"run {number} is too far ahead: at most {last + FURTHEST} now",
                rule="run number",
                hint=hint,
            )

    async def deploy(self, number: int, name: str, sites: Sequence[str], by: str) -> StartPlan:
        """Note sites that accept a staged job, besides those that did before.

        Another package than the one deployed before begins anew.

        Raises:
            NotFoundError: there is no such run or job.
            FailedPreconditionError: the run has begun.
        """

        def decide() -> ev.Event | None:
            prepared = self._runs.shelf.prepared.get(number)
            if prepared is None:
                raise FailedPreconditionError(
                    f"run {number} {'has begun' if self._known(number) else 'does not exist'}",
                    rule="run prepared",
                    hint="set_run_number N takes a new number",
                )
            job, before = self._job(name), prepared.deployed
            same = before is not None and before.job_blob.digest == job.package.digest
            kept = before.sites if before is not None and same else ()
            event = ev.RunPrepared(
                run=number,
                job_name=name,
                job_blob=ev.Blob(digest=job.package.digest, size=job.package.size),
                model=ev.Blob(digest=job.model.digest, size=job.model.size),
                sites=tuple(sorted({*kept, *sites})),
                by=by,
            )
            return None if same and event.sites == kept else event

        await self._runs.step(decide)
        return self.plan(number)

    def _known(self, number: int) -> bool:
        return any(summary.run == number for summary in self._runs.summaries())

    def plan(self, number: int) -> StartPlan:
        """Return what a start would be about.

        Raises:
            NotFoundError: there is no such run.
            FailedPreconditionError: nothing is deployed for it, or it has ended.
        """
        prepared = self._runs.shelf.prepared.get(number)
        if prepared is None:
            state = self._runs.actor(number).state
            blob = state.opened.job_blob
            return StartPlan(
                run=number,
                status=state.status,
                job_name=state.job.name,
                package=ModelRef(blob.digest, blob.size),
                submission_id=state.opened.submission_id,
                sites=state.targets,
                taking_part=tuple(sorted(state.taking_part)),
            )
        deployed = prepared.deployed
        if deployed is None:
            raise FailedPreconditionError(
                f"nothing is deployed for run {number}",
                rule="run deployed",
                hint="deploy JOB TARGET first; list_jobs shows the staged jobs",
            )
        return StartPlan(
            run=number,
            status=PREPARED,
            job_name=deployed.job_name,
            package=ModelRef(deployed.job_blob.digest, deployed.job_blob.size),
            submission_id=prepared.submission_id,
            sites=deployed.sites,
        )

    async def begin(
        self, number: int, order: bytes, submitter: str, min_clients: int | None
    ) -> None:
        """Open a prepared run, or add sites to one at work; the same order again changes nothing.

        Raises:
            FLError: the order, the package or the sites are refused, and why.
        """
        _, start = open_order(
            StartOrder, Signed.from_bytes(order), self._trust.store, datetime.now(UTC)
        )
        if number not in self._runs.shelf.prepared:
            state = self._runs.view(number).state
            given = base64.b64encode(order).decode()
            if any(state.order_of(site) != given for site in start.sites):
                await self._add_targets(number, order, submitter)
            return
        plan = self.plan(number)
        ordered = (start.submission_id, f"blake3:{start.job_digest}")
        if ordered != (plan.submission_id, plan.package.digest):
            raise FailedPreconditionError(
                f"the start order is not for what is deployed as run {number} now",
                rule="run deployed",
                hint="start again",
            )
        await self._submit(order, submitter, min_clients)

    # ---- uploads that nobody uses ----

    async def keep_clean(self) -> None:
        """Collect unused uploads, now and from time to time."""
        while True:
            try:
                await self.collect()
            except Exception as error:  # noqa: BLE001 - whatever is wrong, it must go on
                expected = isinstance(error, FLError | OSError)
                log.error(
                    "unused uploads are not collected: %s",
                    error,
                    exc_info=None if expected else error,
                )
            await asyncio.sleep(SWEEP_S)

    async def collect(self, unused_s: float = UNUSED_S) -> None:
        """Delete blobs that nothing names and that are older than `unused_s` seconds.

        While the log lacks events none is deleted: it may be a model that one of them names.
        """
        if self._runs.loss:
            if not self._told:
                text = "%s; what no run needs is kept, it may be a model: see fl_state verify"
                log.error(text, self._runs.loss)
            self._told = True
            return
        await self._runs.retention.free(())  # the logs are read before the looking, not after
        old = await asyncio.to_thread(self._older_than, time.time() - unused_s)
        await self._runs.retention.free(old.keys())
        gone = await asyncio.to_thread(
            lambda: [size for digest, size in old.items() if not self._blobs.has(digest)]
        )
        if gone:
            log.info("unused blobs collected: %d with %d bytes", len(gone), sum(gone))

    def _older_than(self, moment: float) -> dict[str, int]:
        """Return digests and sizes of blobs that were last written before a moment."""
        found = {}
        for digest in self._blobs.digests():
            try:
                status = self._blobs.path(digest).stat()
            except (NotFoundError, FileNotFoundError):
                continue  # freed meanwhile
            if status.st_mtime < moment:
                found[digest] = status.st_size
        return found
