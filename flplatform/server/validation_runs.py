"""`ValidationRuns`: runs that validate models of an earlier run, chosen when they are opened."""

import asyncio
import base64
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Protocol

from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
)
from flplatform.core.events import Blob, RunOpened, SourceModel, UpdateAccepted
from flplatform.core.job import check_targets
from flplatform.core.messages import GLOBAL_OWNER, LAST_OWNER, SUBMIT_MODEL, ModelRef, TaskId
from flplatform.core.ports import BlobStore
from flplatform.core.validation import ValidationPlan, Wanted
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.package import Package, open_package
from flplatform.security.signing import Signed, StartOrder, open_order
from flplatform.server.client_manager import ClientManager
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs

BEST_OWNER = "best"
MIN_CLIENTS = 1
"""Sites that make a validation: each cell stands for itself."""

_ROUND = re.compile(r"r(0|[1-9][0-9]{0,8})\Z", re.ASCII)


class Trusting(Protocol):
    """Holds the trust store of now."""

    store: TrustStore


class ValidationRuns:
    """Implements `core.validation.ValidationControl`. Lives on the event loop.

    Args:
        trust: verifies packages and orders.
        runs: opens and knows the runs.
        clients: who is barred, and who is denied.
        blobs: where models and packages are.
        demand_site: refuses a revoked site.
    """

    def __init__(
        self,
        trust: Trusting,
        runs: Runs,
        clients: ClientManager,
        blobs: BlobStore,
        demand_site: Callable[[str], None],
    ) -> None:
        self._trust = trust
        self._runs = runs
        self._clients = clients
        self._blobs = blobs
        self._demand_site = demand_site

    async def plan(self, number: int, wanted: Wanted) -> ValidationPlan:
        """Return what a validation of a run would be about.

        Raises:
            FLError: as `core.validation.ValidationControl.plan`.
        """
        source = self._source(number)
        state, job = source.state, source.state.job
        models, gaps = self._choose(source, wanted)
        barred = self._clients.barred()
        for site in wanted.sites:
            self._demand_usable(site)
        package = await self._package(state.opened.job_blob.digest)
        return ValidationPlan(
            run=number,
            status=state.status,
            round=state.round,
            rounds=job.rounds,
            job_name=job.name,
            package=ModelRef(state.opened.job_blob.digest, state.opened.job_blob.size),
            author=package.author.name,
            author_organisation=package.author.organisation,
            author_role=package.author.role,
            has_code=package.has_code,
            models=models,
            gaps=gaps,
            sites=wanted.sites or tuple(site for site in state.targets if site not in barred),
            left_out={}
            if wanted.sites
            else {site: "barred on the server" for site in state.targets if site in barred},
            data=job.data,
            environment=job.environment,
            deadline_s=job.validate_deadline_s,
        )

    async def open(self, number: int, order: bytes, submitter: str, wanted: Wanted) -> int:
        """Open a run that validates models of run `number`; the same submission is opened once.

        Raises:
            FLError: as `core.validation.ValidationControl.open`.
        """
        now = datetime.now(UTC)
        identity, start = open_order(StartOrder, Signed.from_bytes(order), self._trust.store, now)
        if identity.name != submitter:
            raise PermissionDeniedError(
                f"the start order is signed by {identity.name}, the session is {submitter}'s",
                rule="own_order",
            )
        if start.purpose != "validate":
            raise PermissionDeniedError(
                "the start order is for training, too", rule="signed purpose", hint="use validate"
            )
        digest = f"blake3:{start.job_digest}"
        if (run := self._runs.submitted(start.submission_id, digest)) is not None:
            return run
        if digest != self._source(number).state.opened.job_blob.digest:
            raise PermissionDeniedError(
                f"the start order is for another job than that of run {number}",
                rule="signed job digest",
            )
        package = await self._package(digest)
        for who in (identity, package.author):
            self._clients.denials.demand(who)
        check_targets(start.sites, MIN_CLIENTS)
        for site in start.sites:
            self._demand_site(site)
            self._demand_usable(site)
        return await self._runs.open_chosen(
            lambda: self._opened(self._source(number), wanted, start, identity, order)
        )

    def _opened(
        self, source: RunActor, wanted: Wanted, start: StartOrder, by: Identity, order: bytes
    ) -> RunOpened:
        models, gaps = self._choose(source, wanted)
        state = source.state
        return RunOpened(
            run=0,
            job=state.job.model_copy(update={"workflow": ("cross_site_validation",)}),
            job_blob=state.opened.job_blob,
            submission_id=start.submission_id,
            submitter=by.name,
            submitter_organisation=by.organisation,
            order=base64.b64encode(order).decode(),
            sites=tuple(sorted(start.sites)),
            min_clients=MIN_CLIENTS,
            initial_model=state.opened.initial_model,
            source_run=source.run,
            source_round=state.round,
            source_models=models,
            source_gaps=gaps,
        )

    def _source(self, number: int) -> RunActor:
        source = self._runs.view(number)
        if earlier := source.state.opened.source_run:
            raise FailedPreconditionError(
                f"run {number} is itself a validation of run {earlier}",
                rule="source_run",
                hint=f"validate all --run {earlier}",
            )
        return source

    async def _package(self, digest: str) -> Package:
        path, now = self._blobs.path(digest), datetime.now(UTC)
        return await asyncio.to_thread(open_package, path, self._trust.store, now)

    def _demand_usable(self, site: str) -> None:
        known = self._clients.known.keys() | self._clients.live()
        if site not in known:
            raise InvalidArgumentError(
                f"{site[:80]!r} is not registered",
                field="sites",
                hint=f"registered: {', '.join(sorted(known)) or 'none'}",
            )
        if site in self._clients.barred():
            raise InvalidArgumentError(
                f"{site} is disabled", field="sites", hint=f"enable_client {site}"
            )

    # ---- models ----

    def _choose(
        self, source: RunActor, wanted: Wanted
    ) -> tuple[dict[str, SourceModel], dict[str, str]]:
        """Return the wanted models by owner, and of each owner without one why."""
        state = source.state
        if state.step < 0 and set(wanted.owners) != {"r0"}:
            raise FailedPreconditionError(
                f"run {state.run} "
                + (f"{state.status} while deploying" if state.ended else "is deploying")
                + ": it has no model but the initial one",
                rule="no_model",
                hint="validate r0 SITE measures the initial model",
            )
        took_part = [site for site, answer in state.answers.items() if answer.accepted]
        models: dict[str, SourceModel] = {}
        gaps: dict[str, str] = {}
        for owner in wanted.owners or (*sorted(took_part), GLOBAL_OWNER):
            found = (
                self._local(source, owner)
                if owner in state.targets
                else self._global(source, owner)
            )
            if isinstance(found, SourceModel):
                models[owner] = found
            else:
                gaps[owner] = found
        if not models:
            reasons = "; ".join(f"{owner}: {reason}" for owner, reason in gaps.items())
            raise FailedPreconditionError(
                f"there is nothing to validate: {reasons}", rule="no_model"
            )
        return models, gaps

    def _global(self, source: RunActor, owner: str) -> SourceModel:
        state = source.state
        newest = max(state.models)
        if owner == BEST_OWNER or (owner == GLOBAL_OWNER and state.ended):
            return _as("best", *state.best_model)
        if owner in (GLOBAL_OWNER, LAST_OWNER):
            return _as("latest", newest, state.models[newest])
        match = _ROUND.match(owner)
        number = int(match[1]) if match else -1
        if number not in state.models:
            sites = ", ".join(state.targets)
            raise InvalidArgumentError(
                f"{owner[:80]!r} owns no model of run {state.run}",
                field="owner",
                hint=f"its sites are {sites}; its global models r0 to r{newest}, "
                "global, best and last",
            )
        return _as("round", number, state.models[number])

    def _local(self, source: RunActor, site: str) -> SourceModel | str:
        """Return a site's best local model, else its latest update that is kept, else why none."""
        state, submitted = source.state, source.state.gathers.get("submit")
        task = None
        if submitted:
            task = TaskId(state.run, submitted.opened.round, SUBMIT_MODEL, site)
            result = submitted.results.get(task)
            if result and self._blobs.has(result.digest):
                blob = Blob(digest=result.digest, size=result.size)
                return _as("local", submitted.opened.round, blob)
        # A change, or a part of a model, cannot be validated.
        whole = state.job.updates == "full" and not state.job.partial_updates
        for update in _updates(source, site) if whole else ():
            if self._blobs.has(update.digest):
                return _as("update", update.round, Blob(digest=update.digest, size=update.size))
        answer = state.answers.get(site)
        if answer is None or not answer.accepted:
            return f"{site} took no part in run {state.run}"
        failure = submitted.failed.get(task) if submitted and task else None
        why = f" ({failure.error})" if failure else ""
        return f"it handed none in{why}, and no update of it is kept"


def _updates(source: RunActor, site: str) -> Iterator[UpdateAccepted]:
    """Yield a site's updates, the latest first."""
    for event in reversed(source.events):
        if isinstance(event, UpdateAccepted) and event.site == site:
            yield event


def _as(kind: str, number: int, blob: Blob) -> SourceModel:
    return SourceModel.model_validate(
        {"kind": kind, "round": number, "digest": blob.digest, "size": blob.size}
    )
