"""`FederatedServer`: owns the parts, starts and stops them in order.

It has no RPC method and no admin verb: servicers and `ServerControl` have those.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from grpc import aio

from flplatform.core.errors import FLError, PermissionDeniedError, UnauthenticatedError
from flplatform.files.counters import watch_loop
from flplatform.files.durable import write_atomic
from flplatform.files.loops import supervise
from flplatform.files.system import warn_of_few_files
from flplatform.files.threads import Workers, give_way, in_thread
from flplatform.rpc.errors import REPLACED_TOKEN
from flplatform.rpc.interceptors import MAX_TRANSFERS, Caller, Guard
from flplatform.rpc.pace import PaceLimits, Slots
from flplatform.rpc.serving import make_server, serve
from flplatform.rpc.streams import BlobService
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.security.denials import Denials
from flplatform.security.identity import Identity, Kind, TrustStore, identity_of
from flplatform.security.kit import Kit
from flplatform.security.refused_calls import RefusedCalls
from flplatform.server.client_manager import ClientManager
from flplatform.server.control import ServerControl
from flplatform.server.diagnosis import Diagnostics
from flplatform.server.lineage import Lineages
from flplatform.server.metric_log import METRICS, MetricLog
from flplatform.server.refusals import Refusals
from flplatform.server.relay import RequestRelay
from flplatform.server.runs import Runs
from flplatform.server.servicers import (
    FL_RULES,
    AdminCommunicatingServicer,
    FederatedTrainingServicer,
)
from flplatform.server.training import ModelResultProcessor, ResultProcessors, TrainingService
from flplatform.server.upkeep.log_head import IF_MEANT, LogHead
from flplatform.server.upkeep.log_id import OwnLog
from flplatform.server.upkeep.unfinished import demand_finished
from flplatform.server.validation import ValidateResultProcessor
from flplatform.store.blobs import FileBlobStore
from flplatform.store.state import SqlStateStore

log = logging.getLogger(__name__)

WORKERS = 4
"""Threads for file I/O, digests and aggregation; the event loop does none of it."""

SITE_CALLS = 8
"""Control calls of one site in flight: two wait, the others end at once or soon."""

SITES_FILE = "sites.json"
TRUST_RELOAD_S = 30.0
DRAIN_S = 5.0
FATAL_EXIT = 70
"""Exit code after a failed write or fsync: what is on the disk is unknown, the log decides."""


class Trust:
    """The trust store of now: revocation lists are read again while the server runs."""

    def __init__(self, kit: Kit, denials: Denials | None = None) -> None:
        self._kit = kit
        self._denials = Denials() if denials is None else denials
        self.store: TrustStore = kit.trust

    def identify(self, kind: Kind, certificate: bytes) -> Identity:
        """Return the checked identity behind a certificate that TLS has accepted.

        Raises:
            UnauthenticatedError: of another kind or project, revoked or expired.
            PermissionDeniedError: its name is denied.
        """
        identity = identity_of(certificate)
        if identity.kind != kind or identity.project != self.store.project:
            raise UnauthenticatedError(
                f"{identity.uri} is no {kind} of project {self.store.project!r}", rule="identity"
            )
        self.store.check(identity, datetime.now(UTC))
        self._denials.demand(identity)
        return identity

    async def keep_fresh(self) -> None:
        """Reload the revocation lists again and again; a bad list changes nothing."""
        while True:
            await asyncio.sleep(TRUST_RELOAD_S)
            try:
                self.store = await asyncio.to_thread(self._kit.reload_trust)
            except Exception as error:  # noqa: BLE001 - whatever is wrong, it must look again
                known = isinstance(error, FLError | OSError)
                log.error(
                    "revocation lists not reloaded, the old ones stay: %s",
                    error,
                    exc_info=None if known else error,
                )


class FederatedServer:
    """The FL side of a server process, and the parts that its admin side shares.

    Args:
        kit: the server's verified kit.
        end: called with whether to restart, when an admin ends the process.

    Raises:
        ConfigError: a restore did not end, the state folder is lost, or the log is not its own.
        FLError: the state cannot be opened.
    """

    def __init__(self, kit: Kit, end: Callable[[bool], None]) -> None:
        demand_finished(kit)
        limits = kit.server.limits
        folder = kit.state_folder()
        own_log = OwnLog(folder, folder / "blobs", kit.folder)
        own_log.demand_state()
        self._end = end
        self.kit = kit
        self.denials = Denials()
        self.trust = Trust(kit, self.denials)
        self.workers = Workers(WORKERS, thread_name_prefix="blob", initializer=give_way)
        resources = kit.local.resources
        self.store = SqlStateStore(
            resources.state_url or folder / "events.db",
            self._on_fatal,
            resources.state_reconnect_s,
            opening_s=resources.state_reconnect_s,
            admit=own_log.demand,
        )
        own_log.keep(self.store.origin)
        self.blobs = FileBlobStore(folder / "blobs", resources.reserve_of(limits))
        self.audit = AuditLog(folder / "audit.jsonl", kit.identity.name, seal=KitSeal(kit))
        self._refused_calls = RefusedCalls(self.audit)
        self.relay = RequestRelay()
        self.clients = ClientManager(
            limits.max_clients,
            limits.dead_after_s,
            time.monotonic,
            self._clients_changed,
            limits.token_s,
            denials=self.denials,
        )
        self.runs = Runs(
            self.store, self.blobs, self.clients, self.relay, self.workers, self._notify
        )
        head = LogHead(folder)
        if behind := head.why_behind(self.store.name, self.store.read):
            self.runs.lacking.append(f"{behind}; {IF_MEANT}")
        else:
            self.store.committed = head.note
        self.refusals = Refusals()
        processors = ResultProcessors([ModelResultProcessor(), ValidateResultProcessor()])
        self.training = TrainingService(
            self.runs, self.blobs, processors, limits.waiting_call_s, self.refusals.note
        )
        self.control = ServerControl(
            identity=kit.identity,
            trust=self.trust,
            runs=self.runs,
            clients=self.clients,
            relay=self.relay,
            blobs=self.blobs,
            folder=folder,
            end=end,
        )
        self.control.diagnosis = Diagnostics(
            self.runs, self.clients, self.control.sites, self.refusals, limits.heartbeat_s
        )
        self.control.lineage = Lineages(self.runs)
        self.runs.changed = self.control.note_change
        self._metrics = MetricLog(folder / METRICS, self.runs.takes_part)
        self._server: aio.Server | None = None
        self._watch_wanted = asyncio.Event()
        self._sites_wanted = asyncio.Event()
        self._sites_file = folder / SITES_FILE
        if self._sites_file.exists():
            try:
                self.clients.known.update(json.loads(self._sites_file.read_bytes()))
            except (ValueError, TypeError) as error:
                log.error("%s is damaged and made anew: %s", self._sites_file, error)
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0

    def _on_fatal(self, error: BaseException) -> None:
        log.critical("the state store failed, the process ends: %s", error, exc_info=error)
        logging.shutdown()
        os._exit(FATAL_EXIT)

    def _notify(self, sites: set[str]) -> None:
        self.training.notify(sites)

    def _clients_changed(self, names: Sequence[str]) -> None:
        self._watch_wanted.set()
        self._sites_wanted.set()
        self.runs.roster_changed(names)

    async def _keep_sites(self) -> None:
        """Remember who has ever registered, over restarts: whoever is missing can be named."""
        written = dict(self.clients.known)
        while True:
            await self._sites_wanted.wait()
            self._sites_wanted.clear()
            if self.clients.known == written:
                continue
            known = dict(self.clients.known)
            try:
                text = json.dumps(known, indent=1).encode()
                await in_thread(write_atomic, self._sites_file, text)
                written = known
            except Exception as error:  # noqa: BLE001 - whatever is wrong, it must go on
                expected = isinstance(error, FLError | OSError)
                log.error(
                    "%s cannot be written: %s",
                    self._sites_file,
                    error,
                    exc_info=None if expected else error,
                )

    async def start(self) -> None:
        """Go on with unfinished runs, then serve the FL port.

        Raises:
            UnavailableError: the port is taken.
            FLError: the log cannot be read.
        """
        limits = self.kit.server.limits
        self.runs.open()
        counters = self.control.counters
        guard = Guard(
            self._identify,
            self._check_token,
            FL_RULES,
            self.note_refusal,
            counters.took,
            SITE_CALLS,
        )
        slots = Slots(limits.transfer_slots_per_site, limits.transfer_slots)
        transfers = BlobService(
            self.blobs,
            self.training.admit_upload,
            self.training.release_download,
            slots,
            self.workers,
            self.training.note_upload,
            lambda who, task_id, error: self.refusals.note(who.identity.name, task_id, error),
            counters.add,
            PaceLimits(limits.min_transfer_bytes_s, limits.transfer_stall_s),
            self.training.note_broken_off,
        )
        warn_of_few_files(limits.max_clients)
        most = limits.max_clients * (SITE_CALLS + MAX_TRANSFERS)
        self._server = make_server(guard, limits.max_connection_age_s, most)
        self._server.add_generic_rpc_handlers((transfers.handler(),))
        pb_grpc.add_FederatedTrainingServicer_to_server(
            FederatedTrainingServicer(
                self.clients,
                self.relay,
                self.training,
                limits.heartbeat_s,
                self.refusals.note,
                lambda site: self.control.access.send(site),
            ),
            self._server,
        )
        pb_grpc.add_AdminCommunicatingServicer_to_server(
            AdminCommunicatingServicer(
                self.relay, (self._metrics, self.control.logs), limits.waiting_call_s
            ),
            self._server,
        )
        self.port = await serve(
            self._server,
            self.kit.server.fl_address,
            key_pem=self.kit.key_pem(),
            chain_pem=self.kit.chain,
            trusted_pem=self.kit.trust.tls_roots("site"),
        )
        loops = {
            "watch clients": self._watch_clients(),
            "reload trust": self.trust.keep_fresh(),
            "remember sites": self._keep_sites(),
            "watch the loop": watch_loop(counters.took),
            "collect uploads": self.control.staging.keep_clean(),
        }
        self._tasks = supervise(loops, self._end)

    async def stop(self) -> None:
        """Drain: no new calls, then end the runs' deciders and close the state."""
        if self._server:
            self.training.close()
            self.relay.close()
            await self._server.stop(DRAIN_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runs.close()
        await asyncio.to_thread(self.workers.shutdown)
        await asyncio.to_thread(self.store.close)
        await asyncio.to_thread(self._refused_calls.close)
        self.audit.close()

    def _identify(self, certificate: bytes) -> Identity:
        try:
            return self.trust.identify("site", certificate)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            identity = identity_of(certificate)  # TLS has checked who issued it
            if identity.kind == "site" and identity.project == self.kit.identity.project:
                self.refusals.note(identity.name, "certificate", error)
            raise

    def _check_token(self, caller: Caller) -> None:
        self.clients.check_token(caller.identity, caller.token)

    def note_refusal(self, method: str, name: str, peer: str, error: FLError) -> None:
        """Have a refused call audited; the refusal waits for no record of it."""
        if isinstance(error, UnauthenticatedError) and error.rule in ("token", REPLACED_TOKEN):
            log.debug("%s: %s", method, error)  # every site does this once after a restart
            return
        if name and method in FL_RULES:
            self.refusals.note(name, method, error)
        self._refused_calls.note(name, method, peer, error)

    async def _watch_clients(self) -> None:
        while True:
            self.clients.watch()  # before anybody is dropped for a silence that was the server's
            pause = min(self.clients.expire(), self.clients.look_s)
            self._watch_wanted.clear()
            try:
                async with asyncio.timeout(max(pause, 0.05)):
                    await self._watch_wanted.wait()
            except TimeoutError:
                continue
