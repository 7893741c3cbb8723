"""`FedAdminServer`: the FL meaning of the console, on a port of its own."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from grpc import aio

from flplatform.admin.console_desk import ConsoleDesk, NoteRefusal
from flplatform.admin.login import LoginDesk
from flplatform.admin.modules.access import AccessModule
from flplatform.admin.modules.audit import AuditModule
from flplatform.admin.modules.certificates import CertificatesModule
from flplatform.admin.modules.dashboard import DashboardModule
from flplatform.admin.modules.diagnosis import DiagnosisModule
from flplatform.admin.modules.files import FilesModule
from flplatform.admin.modules.hosts import REPLY_TIMEOUT_S, Hosts
from flplatform.admin.modules.lifecycle import LifecycleModule
from flplatform.admin.modules.lineage import LineageModule
from flplatform.admin.modules.logs import LogsModule
from flplatform.admin.modules.models import ModelsModule
from flplatform.admin.modules.reports import ReportsModule
from flplatform.admin.modules.revocation import RevocationModule
from flplatform.admin.modules.shell import ShellModule
from flplatform.admin.modules.starting import StartingModule
from flplatform.admin.modules.stats import StatsModule
from flplatform.admin.modules.status import StatusModule
from flplatform.admin.modules.steps import StepsModule
from flplatform.admin.modules.submission import SubmissionModule
from flplatform.admin.modules.system import SystemModule
from flplatform.admin.modules.taskname import TaskNameModule
from flplatform.admin.modules.training import TrainingModule
from flplatform.admin.modules.validating import ValidatingModule
from flplatform.admin.modules.validation import ValidationModule
from flplatform.admin.orders import OrderBook, Trust
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.servicer import ADMIN_RULES, AdminConsoleServicer
from flplatform.admin.transfers import PortBlobs, Transfers
from flplatform.admin.user_files import UserFiles
from flplatform.admin.users import UserStore
from flplatform.core.errors import ConfigError, FLError, InternalError, UnauthenticatedError
from flplatform.core.ports import AuditSink, BlobStore
from flplatform.files.counters import Counters
from flplatform.files.durable import private_dir
from flplatform.hci import (
    AdminServer,
    AdminSession,
    CommandModule,
    CommandRegister,
    Sessions,
)
from flplatform.rpc.interceptors import Caller, Guard
from flplatform.rpc.pace import PaceLimits, Slots
from flplatform.rpc.serving import make_server, serve
from flplatform.rpc.streams import BlobService
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.audit import KitSeal, Seal
from flplatform.security.authz import PERMISSIONS
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Pause between two looks at sessions, revocations and the policy."""

DRAIN_S = 2.0

REAUTHENTICATE_S = 300.0
"""Age of a password check from which on sensitive commands want a new one."""

AUDIT_FILE = "audit.jsonl"


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
        login: checks and changes passwords, knows everybody who has signed in.
        console: returns the server's side of the console, once all modules are made.
    """

    control: Control
    rights: Rights
    transfers: Transfers
    hosts: Hosts
    sessions: Sessions
    audit: AuditSink
    kit: Kit
    trust: Trust
    login: LoginDesk
    console: Callable[[], AdminServer]

    @property
    def users(self) -> UserStore | None:
        """Everybody who has signed in; None where nobody does."""
        return self.login.users if self.login else None

    def audit_source(self) -> tuple[Path, Seal]:
        """The server's audit file, and what checks its checkpoints."""
        return self.kit.state_folder() / AUDIT_FILE, KitSeal(self.kit)


ModuleFactory: TypeAlias = Callable[[Parts], CommandModule]
"""Makes a command module; packages offer theirs as an entry point of `MODULES_GROUP`."""

MODULES_GROUP = "flplatform.command_modules"
MODULE_HINT = "mend the package, or take it out of command_modules in local/resources.yml"


def modules(parts: Parts) -> list[CommandModule]:
    """Return the modules of this release; a new one is added here."""
    control, hosts = parts.control, parts.hosts
    return [
        SubmissionModule(control),
        StepsModule(control, parts.rights),
        StartingModule(control, parts.rights, parts.transfers),
        TrainingModule(control, parts.rights),
        LifecycleModule(control, hosts),
        StatusModule(control, hosts),
        ModelsModule(control, parts.transfers),
        ValidationModule(control),
        ValidatingModule(control, parts.transfers),
        DiagnosisModule(control, hosts, parts.rights),
        LineageModule(control),
        TaskNameModule(control),
        DashboardModule(control, parts.rights),
        SystemModule(control, hosts),
        ReportsModule(hosts, parts.rights, lambda: parts.kit.state_folder()),
        AccessModule(control, parts.rights, hosts, parts.sessions, parts.login, parts.console),
        RevocationModule(control, parts.sessions, parts.users),
        CertificatesModule(control, parts.users, parts.kit, parts.trust),
        AuditModule(hosts, parts.audit_source),
        ShellModule(control, hosts, parts.rights, parts.kit),
        FilesModule(control, parts.transfers),
        LogsModule(control, hosts),
        StatsModule(control, hosts),
    ]


def _extend(register: CommandRegister, package: str, make: ModuleFactory, parts: Parts) -> None:
    """Add the commands of a package's module.

    Raises:
        ConfigError: names the package, and what is wrong with it.
    """
    try:
        module = make(parts)
        specs = module.commands()
        if not specs:
            raise InternalError("it has no commands")
        for spec in specs:
            if spec.permission not in PERMISSIONS:
                known = ", ".join(PERMISSIONS)
                raise InternalError(
                    f"command {spec.name}: permission {spec.permission!r} is not one of {known}"
                )
        register.add(module)
    except Exception as error:  # whatever code from elsewhere raises
        what = error.message if isinstance(error, FLError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"command module {package}: {what}", hint=MODULE_HINT) from error


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
        more: make the command modules of installed packages, by what to call them in errors.
        counters: of this process.

    Raises:
        ConfigError: the policy, what is remembered of users, or a package's module is wrong.
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
        more: Mapping[str, ModuleFactory] = MappingProxyType({}),
        counters: Counters | None = None,
    ) -> None:
        self._counters = counters or Counters()
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
        reserve_bytes = kit.local.resources.reserve_of(limits)
        user_files = UserFiles(
            kit.state_folder() / "transfer", limits.max_transfer_bytes, reserve_bytes
        )
        self._transfers = Transfers(self._rights, limits, self._session_of, user_files)
        parts = Parts(
            control=control,
            rights=self._rights,
            transfers=self._transfers,
            hosts=Hosts(control, self._rights, organisation, reply_timeout_s),
            sessions=self._sessions,
            audit=audit,
            kit=kit,
            trust=trust,
            login=self._login,
            console=lambda: self._console,
        )
        register = CommandRegister(modules(parts))
        self._console = AdminServer(
            register,
            self._rights,
            audit,
            reauthenticate_s=REAUTHENTICATE_S,
            prepare=self._rights.prepare,
        )
        for package, make in more.items():
            _extend(register, package, make, parts)
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
        guard = Guard(
            self._identify,
            self._check_token,
            ADMIN_RULES,
            self._note_refusal,
            self._counters.took,
        )
        server = make_server(guard, limits.max_connection_age_s)
        slots = Slots(limits.transfer_slots_per_site, limits.transfer_slots)
        transfers = BlobService(
            PortBlobs(self._blobs, self._transfers.user_files),
            self._transfers.admit,
            self._transfers.release,
            slots,
            self._workers,
            moved=self._counters.add,
            pace=PaceLimits(limits.min_transfer_bytes_s, limits.transfer_stall_s),
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
