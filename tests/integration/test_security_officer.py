"""Revocation, passwords and proofs through the real admin port, with a federation in memory."""

import asyncio
import io
import json
from datetime import UTC, datetime

import pytest

from flplatform.admin.console.actions import actions
from flplatform.admin.console.exchange import prove
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.core.access import DenialView
from flplatform.core.control import SiteReply
from flplatform.core.errors import UnauthenticatedError
from flplatform.hci.shell import Shell
from flplatform.security.audit import records
from flplatform.security.denials import Denials, open_denial
from tests.integration.test_admin_port import (  # noqa: F401 - fixtures
    Port,
    control,
    execute,
    federation,
    original,
    serving,
    signed_in,
)

NEW = "correct horse battery staple"


class Console:
    """A shell over the admin port, with somebody at the keyboard."""

    def __init__(self, transport: GrpcTransport, *answers: str) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.questions: list[tuple[str, bool]] = []
        self.answers = list(answers)
        self.shell = Shell(
            transport, out=self.out, err=self.err, actions=actions(transport), env={}
        )

        async def prover(shell: Shell) -> None:
            await prove(transport, shell)

        self.shell.prover = prover
        self.shell.asker = self.answer

    async def answer(self, question: str, hidden: bool) -> str:
        self.questions.append((question, hidden))
        return self.answers.pop(0)

    async def run(self, line: str) -> int:
        return await self.shell.run_command(line)

    @property
    def said(self) -> str:
        return self.out.getvalue() + self.err.getvalue()


def passphrase(port: Port, name: str = "amy") -> str:
    return port.federation.passphrase(name)


async def opens(port: Port, name: str, secret: str) -> bool:
    """Return whether this passphrase opens the kit's key and signs in."""
    try:
        transport = GrpcTransport(Credentials.open(port.federation.open(name), secret))
        await transport.connect()
    except UnauthenticatedError:
        return False
    await transport.close()
    return True


# ---- revoke


def test_revoke_asks_signs_and_carries(federation, control):  # noqa: F811
    control.access.replies = {"site-1": SiteReply("ok"), "site-2": SiteReply("ok")}
    control.access.outcome = ("admin", "lea", False)

    async def main():
        async with serving(federation, control) as port:
            async with signed_in(port, "lea") as lea, signed_in(port, "amy") as amy:
                console = Console(amy, "n", "y")
                assert await console.run("revoke lea --reason left") == 130
                assert control.access.orders == []
                control.access.views = [DenialView("lea", "admin", "", "now", "amy", "")]
                code = await console.run("revoke lea --reason left")
                assert code == 0, console.said
                assert port.server._sessions.live()[0].user == "amy"
                assert len(port.server._sessions.live()) == 1
                assert lea
            return port, console

    port, console = asyncio.run(main())
    assert console.questions[0][0].startswith(
        "revoke the admin lea of a: 1 session of theirs will end; no run of theirs is active."
    )
    ((order, signer),) = control.access.orders
    assert signer == "amy"
    word = open_denial(order, port.trust.store, datetime.now(UTC), Denials(), fresh=True)
    assert (word.name, word.kind, word.reason, word.by) == ("lea", "admin", "left", "amy")
    assert control.access.carried == [("site-1", "site-2")]
    assert "fl_provision revoke lea" in console.said
    noted = [(r["actor"], r["action"]) for r in records(port.audit_path)]
    assert ("amy", "deny") in noted
    assert all(r["details"].get("order") for r in records(port.audit_path) if r["action"] == "deny")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("revoke nobody", "was never seen here"),
        ("revoke sit-1", "did you mean site-1?"),
        ("revoke Ünknown --kind admin", "a person's name"),
    ],
)
def test_a_name_that_is_none_is_not_signed(federation, control, line, text):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            console = Console(amy, "y")
            assert await console.run(line) != 0
            return console

    assert text in asyncio.run(main()).said
    assert control.access.orders == []


# ---- passwd


def test_passwd_changes_key_and_password(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port:
            old = passphrase(port)
            async with signed_in(port) as other, signed_in(port) as amy:
                console = Console(amy, old, NEW, NEW)
                assert await console.run("passwd") == 0, console.said
                assert [hidden for _, hidden in console.questions] == [True] * 3
                assert len(port.server._sessions.live()) == 1
                assert (await execute(amy, "whoami"))[-1]["exit_code"] == 0
                with pytest.raises(UnauthenticatedError):
                    await execute(other, "whoami")  # its session ended, its password is the old
            assert await opens(port, "amy", NEW)
            assert not await opens(port, "amy", old)
            assert old not in console.said
            assert NEW not in console.said
            for path in (port.audit_path, port.folder / "users.json"):
                assert NEW not in path.read_text()

    asyncio.run(main())


def test_what_is_mistyped_changes_nothing(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            old = passphrase(port)
            for answers, text in (
                (("wrong",), "the passphrase is wrong"),
                ((old, "short"), "at least 10 characters"),
                ((old, old), "is the old one"),
                ((old, NEW, NEW + "r"), "not alike"),
                ((old, f" {NEW}"), "without spaces at its ends"),
            ):
                console = Console(amy, *answers)
                assert await console.run("passwd") != 0
                assert text in console.said
            assert await opens(port, "amy", old)

    asyncio.run(main())


def test_a_change_that_breaks_off_locks_nobody_out(federation, control, monkeypatch):  # noqa: F811
    """The key cannot be written: both halves of the old passphrase still hold."""

    async def main():
        async with serving(federation, control) as port:
            old = passphrase(port)
            async with signed_in(port) as amy:
                startup = federation.kit("amy") / "startup"

                def full(*_args):
                    raise OSError(28, "No space left on device", str(startup))

                monkeypatch.setattr("flplatform.security.kit.write_atomic", full)
                console = Console(amy, old, NEW, NEW)
                assert await console.run("passwd") == 1
                assert "no space left" in console.said.lower()
            assert await opens(port, "amy", old)
            assert not await opens(port, "amy", NEW)
            monkeypatch.undo()
            async with signed_in(port) as amy:
                console = Console(amy, old, NEW + "!", NEW + "!")
                assert await console.run("passwd") == 0, console.said
            assert await opens(port, "amy", NEW + "!")

    asyncio.run(main())


def test_the_new_passphrase_holds_though_the_server_never_hears_of_the_key(
    federation,  # noqa: F811
    control,  # noqa: F811
    monkeypatch,
):
    """The console dies between the key and the last message: the new passphrase signs in."""

    async def main():
        async with serving(federation, control) as port:
            old = passphrase(port)
            async with signed_in(port) as amy:
                console = Console(amy, old, NEW, NEW)
                real = amy.execute

                def cut(argv, confirmed, attachment=b""):
                    if argv[0] == "prove":
                        raise UnauthenticatedError("the connection is gone")
                    return real(argv, confirmed, attachment)

                monkeypatch.setattr(amy, "execute", cut)
                assert await console.run("passwd") == 0
                assert "ends with your next sign-in" in console.said
            copy = json.loads((port.folder / "users.json").read_text())["users"]
            assert any(user["new_password_hash"] for user in copy.values())
            assert await opens(port, "amy", NEW)
            copy = json.loads((port.folder / "users.json").read_text())["users"]
            assert not any(user["new_password_hash"] for user in copy.values())
            assert not await opens(port, "amy", old)

    asyncio.run(main())


def test_passwd_needs_somebody_to_ask(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            console = Console(amy)
            console.shell.asker = None
            assert await console.run("passwd") == 2
            assert "typed at a terminal" in console.said

    asyncio.run(main())


# ---- a sensitive command late in a session


def test_a_sensitive_command_wants_the_password_once_more(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            (session,) = port.server._sessions.live()
            session.proved -= 301
            console = Console(amy, "y", "wrong passphrase")
            assert await console.run("shutdown server") == 3
            assert control.calls == []
            console = Console(amy, "y", passphrase(port))
            assert await console.run("shutdown server") == 0, console.said
            assert control.calls == [("stop", False)]
            assert console.questions[1] == ("passphrase of amy, once more: ", True)
            console = Console(amy, "y")
            assert await console.run("shutdown server") == 0  # it holds for five minutes
            session.proved -= 301
            amy.unattended = True  # the passphrase came from a file
            console = Console(amy, "y")
            assert await console.run("shutdown server") == 0, console.said
            assert len(console.questions) == 1
            return port

    port = asyncio.run(main())
    log = [(r["action"], r["decision"], r["reason"]) for r in records(port.audit_path)]
    assert ("login", "allowed", "password checked again") in log


def test_guessing_the_password_within_a_session_is_bounded(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            codes = []
            for guess in ("x", "y", amy.credentials.password):
                body = json.dumps({"password": guess}).encode()
                items = await execute(amy, "prove", attachment=body)
                codes.append(items[-1]["exit_code"])
            assert codes == [1, 1, 1]  # two attempts are allowed here; then even the right one
            return port

    port = asyncio.run(main())
    assert [r["decision"] for r in records(port.audit_path)][1:] == ["denied"] * 3


def test_the_help_says_so(federation, control):  # noqa: F811
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            console = Console(amy)
            await console.run("help revoke")
            return console

    assert "password  asked for if the last time is long ago" in asyncio.run(main()).said
