import asyncio

import pytest

from flplatform.core.errors import InternalError
from flplatform.hci.admin_server import AdminServer
from flplatform.hci.register import CommandRegister
from flplatform.hci.spec import CommandSpec, NoArguments


class Allowing:
    def check(self, session, permission, command, args) -> None:
        assert permission == "session"

    def record(self, *args, **more) -> None: ...


class Module:
    name = "things"
    summary = "for tests"

    def __init__(self, name: str, handler=None) -> None:
        self._spec = CommandSpec(name, "x", NoArguments, handler, "session", False, (name,))

    def commands(self):
        return [self._spec]


async def run(server: AdminServer, session, *argv: str) -> list[dict]:
    return [item async for item in server.execute(session, argv)]


@pytest.fixture
def server() -> AdminServer:
    now = 90.0
    return AdminServer(CommandRegister(), Allowing(), Allowing(), clock=lambda: now)


def test_help_lists_and_explains(server, session):
    text, done = asyncio.run(run(server, session, "help"))
    assert text["text"].startswith("session\n  help, ? ")
    assert "\n  whoami           shows who is signed in\n" in text["text"]
    assert done["exit_code"] == 0
    page, _ = asyncio.run(run(server, session, "?", "watch"))
    assert page["text"].startswith("watch [--every SECONDS] [--times N] COMMAND…")
    error, done = asyncio.run(run(server, session, "help", "whoam"))
    assert error["hint"] == "did you mean whoami?"
    assert done["exit_code"] == 2


def test_whoami(server, session):
    text, data, _ = asyncio.run(run(server, session, "whoami"))
    assert text["text"].startswith("amy@clinic-a.org  lead of clinic-a")
    assert data["value"]["age_s"] == 90.0
    assert "fingerprint" not in data["value"]


@pytest.mark.parametrize("argv", [("bye",), ("exit",), ("timeout", "3"), ("watch", "ops")])
def test_what_the_console_does_alone_is_refused_by_the_server(server, session, argv):
    error, done = asyncio.run(run(server, session, *argv))
    assert error["code"] == "failed_precondition"
    assert done["exit_code"] == 1
    assert server.register.find(argv[0]).local


def test_ops_lists_and_cancel_ends(session):
    async def hang(connection, _args) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        server = AdminServer(CommandRegister([Module("hang", hang)]), Allowing(), Allowing())
        reader = asyncio.create_task(run(server, session, "hang"))
        while not server.operations.live():
            await asyncio.sleep(0)
        table, data, _ = await run(server, session, "ops")
        (op,) = [row[0] for row in table["rows"] if row[1] == "hang"]
        row, done = await run(server, session, "cancel", op)
        assert data["value"][0]["state"] == "running"
        assert row["cells"] == {"command": "hang"}
        assert done["exit_code"] == 0
        error, done = await reader
        assert error["message"] == "cancelled: by amy@clinic-a.org"
        assert done["exit_code"] == 130
        error, _ = await run(server, session, "cancel", op)
        assert error["code"] == "not_found"

    asyncio.run(main())


def test_a_module_cannot_take_a_name_of_the_session():
    with pytest.raises(InternalError, match="whoami is taken"):
        AdminServer(CommandRegister([Module("whoami")]), Allowing(), Allowing())
