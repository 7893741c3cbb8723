"""`Lifecycle`: sites that leave and join runs, given-up tasks, barred sites, deleted runs."""

import asyncio
import base64
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from flplatform.algorithms.recipes import check_recipe
from flplatform.core.control import RunView
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.core.events import RunDeleted, TaskFailed
from flplatform.core.lifecycle import DELETED
from flplatform.core.workflow import AbortTasks, AddTargets, SetQuorum, Withdraw
from flplatform.security.identity import TrustStore
from flplatform.security.signing import Signed, StartOrder, open_order
from flplatform.server.client_manager import ClientManager
from flplatform.server.run_view import run_view
from flplatform.server.runs import Runs
from flplatform.server.wording import moment

log = logging.getLogger(__name__)


class Trusting(Protocol):
    """Holds the trust store of now."""

    store: TrustStore


class Lifecycle:
    """Implements `core.lifecycle.LifecycleControl`. Lives on the event loop.

    Args:
        trust: holds the trust store of now.
        runs: all runs.
        clients: who is there, and who is barred.
        known: returns the names of all sites that have ever registered.
        forget: removes what the server keeps of a run beside its events and blobs; it blocks.
    """

    def __init__(
        self,
        trust: Trusting,
        runs: Runs,
        clients: ClientManager,
        known: Callable[[], Collection[str]],
        forget: Callable[[int], None],
    ) -> None:
        self._trust = trust
        self._runs = runs
        self._clients = clients
        self._known = known
        self._forget = forget

    # ---- runs at work ----

    async def withdraw(self, number: int, sites: Sequence[str], by: str) -> None:
        """End a run at some of its sites; at all that take part, end it.

        Raises:
            FLError: no such run, it has ended, or a site has no part in it.
        """
        given = Withdraw(tuple(sites), by, f"withdrawn by {by}")
        await self._runs.actor(number).tell(given)

    async def abort_task(self, number: int, site: str, by: str) -> tuple[str, ...]:
        """Give up a site's open tasks and return their ids; the site stays in the run.

        Raises:
            FLError: no such run, it has ended, or the site has no open task in it.
        """
        events = await self._runs.actor(number).tell(AbortTasks((site,), by))
        return tuple(event.task_id for event in events if isinstance(event, TaskFailed))

    async def set_quorum(self, number: int, min_clients: int, by: str) -> None:
        """Change a run's quorum; a round that can close now closes.

        Raises:
            FLError: no such run, it has ended, the number is out of bounds, or the run's
                aggregator cannot work with so few updates.
        """
        actor = self._runs.actor(number)
        job = actor.state.job
        try:
            check_recipe(job, actor.manifest, min_clients)
        except InvalidArgumentError as error:
            raise FailedPreconditionError(
                f"aggregator {job.aggregator.name} of run {number} refuses min_clients "
                f"{min_clients}: {error}",
                rule="aggregator",
            ) from None
        await actor.tell(SetQuorum(min_clients, by))

    async def add_targets(self, number: int, order: bytes, submitter: str) -> None:
        """Have sites join a run from its next round on.

        Args:
            number: the run.
            order: a start order for the run's job that names these sites. A site that has
                accepted the run before refuses an order with a submission id that it knows.
            submitter: the session's user, who must have signed it.

        Raises:
            FLError: the order is refused, a site is unknown, barred or takes part already, or
                the run is not at work.
        """
        now = datetime.now(UTC)
        identity, start = open_order(StartOrder, Signed.from_bytes(order), self._trust.store, now)
        if identity.name != submitter:
            raise PermissionDeniedError(
                f"the start order is signed by {identity.name}, the session is {submitter}'s",
                rule="own_order",
            )
        actor = self._runs.actor(number)
        if source := actor.state.opened.source_run:
            raise FailedPreconditionError(
                f"run {number} is a validation of run {source}: its sites are fixed",
                rule="source_run",
                hint=f"validate all --run {source} --sites SITE",
            )
        if start.purpose != "train":
            raise PermissionDeniedError(
                "the start order is for validation only", rule="signed purpose"
            )
        if f"blake3:{start.job_digest}" != actor.state.opened.job_blob.digest:
            raise PermissionDeniedError(
                f"the start order is for another job than that of run {number}",
                rule="signed job digest",
            )
        for site in start.sites:
            self._demand_known(site)
            if site in self._clients.barred():
                raise InvalidArgumentError(
                    f"{site} is disabled", field="sites", hint=f"enable_client {site}"
                )
        sites = tuple(sorted(start.sites))
        await actor.tell(AddTargets(sites, base64.b64encode(order).decode(), submitter))

    # ---- sites ----

    async def set_enabled(self, site: str, enabled: bool, by: str) -> bool:
        """Let a site take part, or bar it; return whether that changed anything.

        Raises:
            NotFoundError: no such site has ever registered.
            ResourceExhaustedError: nothing can be stored.
        """
        self._demand_known(site)
        if enabled != (site in self._clients.disabled):
            return False
        await self._runs.set_enabled(site, enabled, by)
        return True

    def _demand_known(self, site: str) -> None:
        if site not in self._known():
            raise NotFoundError(f"{site[:80]!r} has never registered", field="sites")

    # ---- runs that are over ----

    async def delete(self, number: int, by: str) -> None:
        """Delete a run that is over or has not begun; its blobs are freed unless others need them.

        Its number stays taken and its events stay, for the lineage of models made from its own.

        Raises:
            NotFoundError: no such run, or it was deleted before.
            FailedPreconditionError: it is at work.
            FLError: its log cannot be read, or nothing can be stored.
        """
        decide, over = self._drop, frozenset[str]()
        if number not in self._runs.shelf.prepared:
            self._demand_over(number)
            decide, over = self._delete, await self._runs.blobs_of(number)

        async def work() -> None:
            await self._runs.step(lambda: decide(number, by))
            log.info("run %d deleted by %s", number, by)
            await self._runs.retention.free(over)
            await asyncio.to_thread(self._forget, number)

        await self._runs.background.through(work())

    def _drop(self, number: int, by: str) -> RunDeleted:
        if number not in self._runs.shelf.prepared:  # a start was faster
            raise FailedPreconditionError(f"run {number} has begun", rule="run_ended")
        return RunDeleted(run=number, by=by)

    def _delete(self, number: int, by: str) -> RunDeleted:
        self._demand_over(number)
        return RunDeleted(run=number, by=by)

    def _demand_over(self, number: int) -> None:
        active = self._runs.active()
        if validating := [a.run for a in active if a.state.opened.source_run == number]:
            raise FailedPreconditionError(
                f"run {number} is being validated by run {validating[0]}",
                rule="being_validated",
                hint=f"wait {validating[0]}, or abort all --run {validating[0]}",
            )
        summary = self._runs.summary(number)
        if not summary.ended:
            raise FailedPreconditionError(f"run {number} is {summary.status}", rule="run_ended")

    def deleted(self) -> list[RunView]:
        """Return the deleted runs, oldest first; the reason tells by whom and when."""
        return [
            replace(
                run_view(summary, None),
                status=DELETED,
                reason=f"{summary.status}; deleted by {summary.deleted_by} on "
                f"{moment(summary.deleted)}",
            )
            for summary in self._runs.summaries()
            if summary.deleted
        ]
