"""`ServerControl`: every operator's question and verb, answered by one call on the parts."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from flplatform import __version__
from flplatform.core import events as ev
from flplatform.core.control import (
    MatrixView,
    RoundMetrics,
    RunView,
    ServerView,
    SiteReply,
    SiteView,
)
from flplatform.core.diagnosis import DiagnosisControl
from flplatform.core.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from flplatform.core.lineage import LineageControl
from flplatform.core.messages import LAST_OWNER, ModelRef
from flplatform.core.ports import BlobStore
from flplatform.core.workflow import Abort
from flplatform.files.counters import Counters
from flplatform.files.modelfile import check_finite, load
from flplatform.files.system import system_info
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.package import open_package
from flplatform.security.signing import Signed, StartOrder, open_order
from flplatform.server.client_manager import ClientManager
from flplatform.server.denials import DenialDesk
from flplatform.server.file_tree import FileTree
from flplatform.server.lifecycle import Lifecycle
from flplatform.server.logs import RunLogs
from flplatform.server.metric_log import METRICS, metric_file
from flplatform.server.relay import RequestRelay
from flplatform.server.run_actor import RunActor
from flplatform.server.run_view import run_view
from flplatform.server.runs import Runs
from flplatform.server.staging import Staging
from flplatform.server.stats import ServerStats
from flplatform.server.validation import cross_validation
from flplatform.server.validation_runs import ValidationRuns


class Trusting(Protocol):
    """Holds the trust store of now; it is replaced when revocation lists change."""

    store: TrustStore


class ServerControl:
    """Implements the Protocols of `core.control`; lives on the event loop."""

    diagnosis: DiagnosisControl
    lineage: LineageControl
    """Set by the server: they explain what its other parts refuse."""

    def __init__(
        self,
        *,
        identity: Identity,
        trust: Trusting,
        runs: Runs,
        clients: ClientManager,
        relay: RequestRelay,
        blobs: BlobStore,
        folder: Path,
        end: Callable[[bool], None],
    ) -> None:
        self._identity = identity
        self._trust = trust
        self._runs = runs
        self._clients = clients
        self._relay = relay
        self._blobs = blobs
        self._folder = folder
        self._end = end
        self._started = time.monotonic()
        self.logs = RunLogs(runs.view)
        relay.returned = self.logs.returned
        self.counters = Counters()
        self.stats = ServerStats(self.counters, runs, relay)
        self.files = FileTree(runs, self.metrics, self.cross_validation)
        self._changed = asyncio.Event()
        self.lifecycle = Lifecycle(
            trust,
            runs,
            clients,
            lambda: clients.known.keys() | clients.live(),
            lambda run: metric_file(folder / METRICS, run).unlink(missing_ok=True),
        )
        self.access = DenialDesk(trust, runs, clients, relay)
        self.staging = Staging(
            trust, runs, blobs, self.submit, lambda *joining: self.add_targets(*joining)
        )
        self.validations = ValidationRuns(trust, runs, clients, blobs, self.access.demand_site)

    # ---- runs ----

    def runs(self) -> list[RunView]:
        """Return all runs, oldest first."""
        active = {actor.run: actor for actor in self._runs.active()}
        return [
            run_view(summary, active.get(summary.run))
            for summary in self._runs.summaries()
            if not summary.deleted
        ]

    def run(self, number: int) -> RunView:
        """Return one run.

        Raises:
            NotFoundError: no such run.
        """
        actor = None if number in self._runs.shelf.prepared else self._runs.view(number)
        summary = next(item for item in self._runs.summaries() if item.run == number)
        return run_view(summary, actor)

    async def load(self, number: int) -> None:
        """Read an ended run's log beside the event loop, see `core.control.RunsControl`.

        Raises:
            FLError: no such run, or its log cannot be read.
        """
        if number not in self._runs.shelf.prepared:
            await self._runs.read(number)

    def active_runs(self) -> list[int]:
        """Return the numbers of the runs that have not ended."""
        return [actor.run for actor in self._runs.active()]

    async def submit(self, order: bytes, submitter: str, min_clients: int | None) -> int:
        """Open a run for a signed start order whose package and model are uploaded.

        Raises:
            FLError: the order, the package or the job is refused, and why.
        """
        now = datetime.now(UTC)
        identity, start = open_order(StartOrder, Signed.from_bytes(order), self._trust.store, now)
        if identity.name != submitter:
            raise PermissionDeniedError(
                f"the start order is signed by {identity.name}, the session is {submitter}'s",
                rule="own_order",
            )
        if start.purpose != "train":
            raise PermissionDeniedError(
                "the start order is for validation only", rule="signed purpose"
            )
        digest = f"blake3:{start.job_digest}"
        if (run := self._runs.submitted(start.submission_id, digest)) is not None:
            return run
        with self._runs.retention.hold(digest):  # also who deletes a run that shares it
            path = self._blobs.path(digest)
            package = await asyncio.to_thread(open_package, path, self._trust.store, now)
            with self._runs.retention.hold(package.model.digest):
                await self._check_model(package.model)
                for site in start.sites:
                    self.access.demand_site(site)
                known = [site.name for site in self.sites()]  # one that is away may come back
                return await self._runs.submit(
                    package,
                    identity,
                    order=order,
                    submission_id=start.submission_id,
                    blob=ModelRef(digest, path.stat().st_size),
                    sites=resolve_sites(start.sites, known, self._clients.barred()),
                    min_clients=min_clients,
                )

    async def _check_model(self, model: ModelRef) -> None:
        if not self._blobs.has(model.digest):
            raise NotFoundError("the initial model was not uploaded", hint="submit the job again")
        path = self._blobs.path(model.digest)
        await asyncio.to_thread(lambda: check_finite(load(path), "initial model"))

    async def add_targets(self, number: int, order: bytes, submitter: str) -> None:
        """Have the sites of a signed start order join a run, see `Lifecycle.add_targets`.

        Raises:
            FLError: the order, the run or a site is refused, and why.
        """
        await self.lifecycle.add_targets(number, order, submitter)

    async def abort(self, number: int, by: str) -> None:
        """End a run.

        Raises:
            NotFoundError, FailedPreconditionError: no such run, or it has ended.
        """
        await self._runs.actor(number).tell(Abort(by, f"aborted by {by}"))

    async def set_min_clients(self, number: int, min_clients: int, by: str) -> None:
        """Change a run's quorum; a round that can close now closes.

        Raises:
            FLError: no such run, it has ended, or the number is out of bounds.
        """
        await self.lifecycle.set_quorum(number, min_clients, by)

    async def wait_ended(self, number: int) -> RunView:
        """Return the run once it has ended."""
        seen = 0
        while not self.run(number).ended:
            seen = await self.wait_changed(number, seen)
        return self.run(number)

    async def wait_changed(self, number: int, seen: int) -> int:
        """Return the number of events of a run once it exceeds `seen`, or the run has ended."""
        while len(self._runs.view(number).events) <= seen and not self._runs.ended(number):
            await self._changed.wait()
        return len(self._runs.view(number).events)

    def note_change(self) -> None:
        """Wake everybody who waits for a run to change."""
        self.counters.add("appends")
        self.logs.changed()
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- models ----

    def metrics(self, number: int) -> list[RoundMetrics]:
        """Return what is known of each global model of a run, in round order.

        Raises:
            NotFoundError: no such run.
        """
        return _metrics(self._runs.view(number))

    def cross_validation(self, number: int) -> MatrixView:
        """Return a run's matrix.

        Raises:
            NotFoundError: no such run.
        """
        return cross_validation(self._runs.view(number).state)

    def model(self, number: int, which: int | str) -> tuple[int, ModelRef]:
        """Return round and blob of a global model: a round, `best` or `last`.

        Raises:
            NotFoundError: no such run or round.
        """
        state = self._runs.view(number).state
        round_number: int
        if which == "best":
            round_number = state.best_model[0]
        elif which == "last":
            round_number = max(state.models)
        elif str(which).isdecimal():
            round_number = int(which)
        else:
            round_number = -1
        blob = state.models.get(round_number)
        if blob is None:
            raise NotFoundError(
                f"run {number} has no global model of round {which}",
                hint=f"it has rounds 0 to {max(state.models)}, best and last",
            )
        return round_number, ModelRef(blob.digest, blob.size)

    # ---- sites ----

    def sites(self) -> list[SiteView]:
        """Return every site that has ever registered, in name order."""
        now = self._clients.clock()
        live, gone = self._clients.live(), self._clients.gone
        views, barred = [], self._clients.barred()
        for name in sorted(live | self._clients.known.keys() | self._clients.disabled):
            client = self._clients.get(name)
            left = "revoked" if name in barred else self._clients.parted.get(name, "away")
            state = "live" if client else "expected" if name in live else left
            heard = client.last_seen if client else gone.get(name)
            views.append(
                SiteView(
                    name=name,
                    organisation=self._clients.known.get(name, ""),
                    state="disabled" if name in self._clients.disabled else state,
                    runs=tuple(
                        (report.run, report.round, report.phase, now - report.since)
                        for report in (client.reports if client else ())
                    ),
                    last_seen_s=None if heard is None else now - heard,
                    certificate_days=_days_left(client.identity) if client else None,
                    isolation=client.isolation if client else "",
                    version=client.version if client else "",
                    contested=client is not None and self._clients.is_contested(client),
                )
            )
        return views

    async def ask(
        self,
        sites: Sequence[str],
        topic: str,
        *,
        timeout_s: float,
        signed: bytes = b"",
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, SiteReply]:
        """Relay a request to sites; each of them is in the answer."""
        replies = await self._relay.ask(sites, topic, timeout_s=timeout_s, signed=signed, body=body)
        return {
            site: SiteReply(reply.status, reply.body, reply.message, reply.rule)
            for site, reply in replies.items()
        }

    def remove(self, site: str) -> None:
        """Drop a site's registration, so that it can register again at once.

        Raises:
            NotFoundError: no such site is registered.
        """
        self._clients.remove(site, "removed")

    # ---- server ----

    def server(self) -> ServerView:
        """Return the server as it is now."""
        return ServerView(
            project=self._identity.project,
            name=self._identity.name,
            version=__version__,
            state="no database" if self._runs.trouble else "serving",
            trouble=self._runs.trouble or self._runs.loss,
            uptime_s=time.monotonic() - self._started,
            max_clients=self._clients.max_clients,
            registered=len(self._clients.clients()),
            certificate_days=_days_left(self._identity),
            last_event=self._runs.last_event,
        )

    def stop(self, *, restart: bool) -> None:
        """Drain and end the process; with `restart`, its supervisor starts it again."""
        self._end(restart)

    def system(self) -> Mapping[str, Any]:
        """Return processor, memory and disk of the server's machine."""
        return system_info(self._folder)


def _days_left(identity: Identity) -> float:
    return (identity.not_after - datetime.now(UTC)).total_seconds() / 86400


def _metrics(actor: RunActor) -> list[RoundMetrics]:
    sites: dict[int, dict[str, Mapping[str, float]]] = {}
    training: dict[int, dict[str, Mapping[str, float]]] = {}
    closed: dict[int, ev.RoundClosed] = {}
    for event in actor.events:
        match event:
            case ev.UpdateAccepted():
                sites.setdefault(event.round - 1, {})[event.site] = event.received
                training.setdefault(event.round, {})[event.site] = event.metrics
            case ev.ResultAccepted() if f"/validate.{LAST_OWNER}/" in event.task_id:
                number = int(event.task_id.split("/")[1])
                sites.setdefault(number, {})[event.site] = event.metrics
            case ev.RoundClosed():
                closed[event.round] = event
    state = actor.state
    return [
        RoundMetrics(
            round=number,
            score=state.scores.get(number),
            best=number == state.best_round,
            sites=sites.get(number, {}),
            training=training.get(number, {}),
            digest=blob.digest,
            closed=closed[number].reason if number in closed else "",
            stragglers=closed[number].stragglers if number in closed else (),
        )
        for number, blob in sorted(state.models.items())
    ]


def resolve_sites(
    requested: Sequence[str], known: Sequence[str], disabled: frozenset[str]
) -> tuple[str, ...]:
    """Return the target sites of a submission: those asked for, or every enabled one.

    Raises:
        InvalidArgumentError: a site is unknown or disabled.
    """
    for site in requested:
        if site not in known:
            raise InvalidArgumentError(
                f"{site[:80]!r} is not registered",
                field="sites",
                hint=f"registered: {', '.join(known) or 'none'}",
            )
        if site in disabled:
            raise InvalidArgumentError(
                f"{site} is disabled", field="sites", hint=f"enable_client {site}"
            )
    return tuple(requested) or tuple(site for site in known if site not in disabled)
