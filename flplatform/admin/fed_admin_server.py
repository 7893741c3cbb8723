"""`FedAdminServer`: the FL meaning of the console, on a port of its own."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from grpc import aio

from flplatform.admin.console_desk import ConsoleDesk, NoteRefusal
from flplatform.admin.login import LoginDesk
from flplatform.admin.modules.hosts import REPLY_TIMEOUT_S, Hosts
from flplatform.admin.modules.models import ModelsModule
from flplatform.admin.modules.status import StatusModule
from flplatform.admin.modules.submission import SubmissionModule
from flplatform.admin.modules.system import SystemModule
from flplatform.admin.modules.training import TrainingModule
from flplatform.admin.modules.validation import ValidationModule
from flplatform.admin.orders import OrderBook, Trust
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.servicer import ADMIN_RULES, AdminConsoleServicer
from flplatform.admin.transfers import Transfers
from flplatform.core.errors import UnauthenticatedError
from flplatform.core.ports import AuditSink, BlobStore
from flplatform.files.durable import private_dir
from flplatform.hci import (
    AdminServer,
    AdminSession,
    CommandModule,
    CommandRegister,
    Sessions,
)
from flplatform.rpc.interceptors import Caller, Guard
from flplatform.rpc.serving import make_server, serve
from flplatform.rpc.streams import BlobService, Slots
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Pause between two looks at sessions, revocations and the policy."""

DRAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What command modules are made of.

    Attributes:
        control: sees and steers the federation.
        rights: decides who may do what, where.
        transfers: grants downloads and admits uploads.
        hosts: carries a command to server and sites, one row per target.
        sessions: who is signed in.
        audit: hears of every decision.
        kit: the server's verified kit.
        trust: holds the trust store of now.
    """

    control: Control
    rights: Rights
    transfers: Transfers
    hosts: Hosts
    sessions: Sessions
    audit: AuditSink
    kit: Kit
    trust: Trust


ModuleFactory: TypeAlias = Callable[[Parts], CommandModule]
"""Makes a command module; packages offer theirs as an entry point of `MODULES_GROUP`."""

MODULES_GROUP = "flplatform.command_modules"


def modules(parts: Parts) -> list[CommandModule]:
    """Return the modules of this release; a new one is added here."""
    control, hosts = parts.control, parts.hosts
    return [
        SubmissionModule(control),
        TrainingModule(control),
        StatusModule(control, hosts),
        ModelsModule(control, parts.transfers),
        ValidationModule(control),
        SystemModule(control, hosts),
    ]


class FedAdminServer:
    """Owns the parts of the admin side, starts and stops them in order.

    Args:
        kit: the server's verified kit.
        control: sees and steers the federation.
        blobs: where packages and models are.
        audit: hears of every decision.
        trust: holds the trust store of now.
        workers: threads for disk and passwords.
        note_refusal: audits a refused call.
        reply_timeout_s: how long a site may take to answer a command.
        more: make the command modules of packages that the operator has installed.

    Raises:
        ConfigError: the policy, or what is remembered of users, is wrong.
        OSError: the state folder cannot be read.
    """

    def __init__(
        self,
        kit: Kit,
        control: Control,
        *,
        blobs: BlobStore,
        audit: AuditSink,
        trust: Trust,
        workers: Executor,
        note_refusal: NoteRefusal,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
        more: Sequence[ModuleFactory] = (),
    ) -> None:
        limits = kit.server.limits
        organisation = kit.identity.organisation
        self._kit = kit
        self._trust = trust
        self._blobs = blobs
        self._workers = workers
        self._note_refusal = note_refusal
        self._sessions = Sessions(
            idle_s=limits.session_idle_s, absolute_s=limits.session_s, on_close=self._ended
        )
        self._login = LoginDesk(
            folder=private_dir(kit.state_folder()),
            limits=limits,
            trust=trust,
            sessions=self._sessions,
            audit=audit,
            workers=workers,
        )
        self._rights = Rights(kit.folder / "local" / "policy.yml", organisation, control)
        self._transfers = Transfers(self._rights, limits, self._session_of)
        parts = Parts(
            control=control,
            rights=self._rights,
            transfers=self._transfers,
            hosts=Hosts(control, self._rights, organisation, reply_timeout_s),
            sessions=self._sessions,
            audit=audit,
            kit=kit,
            trust=trust,
        )
        register = CommandRegister([*modules(parts), *(make(parts) for make in more)])
        self._console = AdminServer(register, self._rights, audit)
        self._rights.load([view.name for view in register.views()])
        self._desk = ConsoleDesk(
            console=self._console,
            sessions=self._sessions,
            orders=OrderBook(trust, limits.clock_skew_s),
            rights=self._rights,
            control=control,
            note_refusal=note_refusal,
        )
        self._seen: dict[str, Identity] = {}  # by fingerprint: whom revocations may concern
        self._server: aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Serve the admin port.

        Raises:
            UnavailableError: the port is taken.
        """
        kit, limits = self._kit, self._kit.server.limits
        guard = Guard(self._identify, self._check_token, ADMIN_RULES, self._note_refusal)
        server = make_server(guard, limits.max_connection_age_s)
        slots = Slots(limits.transfer_slots_per_site, limits.transfer_slots)
        transfers = BlobService(
            self._blobs, self._transfers.admit, self._transfers.release, slots, self._workers
        )
        server.add_generic_rpc_handlers((transfers.handler(),))
        pb_grpc.add_AdminConsoleServicer_to_server(
            AdminConsoleServicer(kit.identity, self._login, self._desk), server
        )
        self.port = await serve(
            server,
            kit.server.admin_address,
            key_pem=kit.key_pem(),
            chain_pem=kit.chain,
            trusted_pem=kit.trust.tls_roots("admin"),
        )
        self._server = server
        self._watch = asyncio.create_task(self._keep_watch(), name="watch sessions")

    async def stop(self) -> None:
        """Take no new calls, end the commands under way, then close the port."""
        if self._watch is not None:
            self._watch.cancel()
        closing = asyncio.create_task(self._server.stop(DRAIN_S)) if self._server else None
        await self._console.close()
        if closing is not None:
            await closing

    def _identify(self, certificate: bytes) -> Identity:
        identity = self._trust.identify("admin", certificate)
        self._seen[identity.fingerprint] = identity
        return identity

    def _session_of(self, caller: Caller) -> AdminSession:
        return self._sessions.get(caller.token, caller.identity.fingerprint)

    def _check_token(self, caller: Caller) -> None:
        self._session_of(caller)

    def _ended(self, session: AdminSession) -> None:
        self._console.operations.end_session(session)
        self._transfers.end_session(session)

    async def _keep_watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """End the sessions that are over, and take in a changed policy."""
        for operation in self._console.operations.live():
            operation.session.last_used = self._sessions.clock()  # who waits is not idle
        for session in self._sessions.live():
            try:
                self._trust.store.check(self._seen[session.fingerprint], datetime.now(UTC))
            except UnauthenticatedError as error:
                log.warning("session %s ends: %s", session.id, error)
                self._sessions.close(session.id)
        self._rights.reload()
