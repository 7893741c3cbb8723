"""A console without wire and signatures: lines in, reply items out."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flplatform.admin.fed_admin_server import Parts, modules
from flplatform.admin.modules.hosts import Hosts
from flplatform.admin.orders import Ordered, take_in_hand
from flplatform.admin.rights import Rights
from flplatform.admin.transfers import Transfers
from flplatform.admin.user_files import UserFiles
from flplatform.core.config import ServerLimits
from flplatform.hci import AdminServer, AdminSession, CommandRegister, Sessions, tokenise
from flplatform.security.identity import Identity
from flplatform.security.signing import CommandOrder
from tests.support.control import FakeControl, site
from tests.support.federation import Federation, provision
from tests.support.replies import check

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
SIGNED = b"exactly what was signed"


def identity(name: str, role: Any, organisation: str) -> Identity:
    return Identity(
        project="heart",
        kind="admin",
        organisation=organisation,
        name=name,
        role=role,
        fingerprint=f"fp-{name}",
        serial=1,
        not_after=NOW + timedelta(days=300),
    )


USERS = {
    "amy": identity("amy", "project_admin", "hub"),
    "oli": identity("oli", "org_admin", "a"),
    "lea": identity("lea", "lead", "a"),
    "max": identity("max", "member", "a"),
}


def session_of(user: str) -> AdminSession:
    who = USERS[user]
    return AdminSession(
        f"s-{user}", user, who.role, who.organisation, "peer", who.fingerprint, 0.0, 0.0
    )


@dataclass
class Reply:
    items: list[dict[str, Any]]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {item["target"]: item for item in self.items if item["type"] == "row"}

    @property
    def statuses(self) -> dict[str, str]:
        return {
            target: f"{row['status']} {row['detail']}".strip() for target, row in self.rows.items()
        }

    @property
    def text(self) -> str:
        return "\n".join(item["text"] for item in self.items if item["type"] == "text")

    @property
    def table(self) -> dict[str, Any]:
        (table,) = (item for item in self.items if item["type"] == "table")
        return table

    @property
    def error(self) -> dict[str, Any]:
        (error,) = (item for item in self.items if item["type"] == "error")
        return error

    @property
    def remembered(self) -> dict[str, Any]:
        return {item["key"]: item["value"] for item in self.items if item["type"] == "session"}

    @property
    def question(self) -> str:
        return self.items[-1].get("question", "")

    @property
    def code(self) -> int | None:
        return self.items[-1].get("exit_code")

    def data(self, name: str) -> Any:
        return next(
            item["value"] for item in self.items if item["type"] == "data" and item["name"] == name
        )


@dataclass
class Console:
    """The server's side of the console, over a fake federation."""

    control: FakeControl
    policy: Path
    records: list[tuple[str, str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rights = Rights(self.policy, "hub", self.control)
        user_files = UserFiles(self.policy.parent / "transfer", 1000)
        self.transfers = Transfers(
            self.rights, ServerLimits(), lambda caller: session_of("amy"), user_files
        )
        self.register = CommandRegister(modules(self.parts()))
        self.server = AdminServer(self.register, self.rights, self)
        self.rights.load([view.name for view in self.register.views()])

    def parts(self) -> Parts:
        """What modules are made of; kit and trust are for tests that need them to set."""
        return Parts(
            control=self.control,
            rights=self.rights,
            transfers=self.transfers,
            hosts=Hosts(self.control, self.rights, "hub"),
            sessions=Sessions(idle_s=60, absolute_s=600),
            audit=self,
            kit=None,
            trust=None,
            login=None,
            console=lambda: self.server,
        )

    def record(self, actor, action, decision, *, reason="", details=None, correlation_id=""):
        self.records.append((actor["name"], action, decision, reason))

    async def run(
        self,
        line: str | list[str],
        user: str = "amy",
        *,
        run: int | None = None,
        confirmed: bool = True,
        attachment: bytes = b"",
        session: AdminSession | None = None,
    ) -> Reply:
        session = session or session_of(user)
        argv = tokenise(line) if isinstance(line, str) else line
        order = CommandOrder(
            project="heart",
            issued_at=NOW,
            not_after=NOW + timedelta(seconds=60),
            id="0" * 32,
            argv=tuple(argv),
            run=run,
        )
        command = Ordered(order, USERS[user], SIGNED, attachment)
        command.reply_timeout_s = session.reply_timeout_s
        take_in_hand(command)
        reply = self.server.execute(session, argv, confirmed=confirmed)
        items = [item async for item in reply]
        check(items)
        return Reply(items)

    def __call__(self, *args: Any, **options: Any) -> Reply:
        return asyncio.run(self.run(*args, **options))


@pytest.fixture
def control() -> FakeControl:
    return FakeControl(site_views=[site("a"), site("b")])


@pytest.fixture
def console(control: FakeControl, tmp_path: Path) -> Console:
    return Console(control, tmp_path / "policy.yml")


@pytest.fixture
def in_hand() -> Callable[..., Ordered]:
    """Take a command in hand, as the desk does."""

    def take(user: str = "amy", *argv: str, run: int | None = None) -> Ordered:
        order = CommandOrder(
            project="heart",
            issued_at=NOW,
            not_after=NOW + timedelta(seconds=60),
            id="0" * 32,
            argv=argv or ("check_status", "all"),
            run=run,
        )
        command = Ordered(order, USERS[user], SIGNED)
        take_in_hand(command)
        return command

    return take


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Real kits, for tests that only read them."""
    return provision(
        tmp_path_factory.mktemp("federation"),
        sites={"site-1": "a"},
        admins={"amy": "project_admin", "lea": "lead@a"},
    )


@pytest.fixture
def trust(federation: Federation) -> SimpleNamespace:
    return SimpleNamespace(store=federation.open("server").trust)
