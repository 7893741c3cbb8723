"""A console whose server is a list of replies."""

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flplatform.admin.console.transport import Credentials
from flplatform.hci.shell import Shell
from flplatform.hci.view import SpecView
from tests.unit.admin.conftest import Console

DONE = {"type": "done", "exit_code": 0, "ok": 0, "failed": 0, "seconds": 0.0}


def done(code: int) -> dict[str, Any]:
    return {**DONE, "exit_code": code}


def data(name: str, value: Any) -> dict[str, Any]:
    return {"type": "data", "name": name, "value": value}


def text(line: str) -> dict[str, Any]:
    return {"type": "text", "text": line}


def error(message: str = "no", code: str = "permission_denied") -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message, "field": "", "hint": "", "rule": ""}


class Scripted:
    """Stands for `GrpcTransport`.

    Attributes:
        replies: per command a list of items; an exception among them is raised there.
        sent: (words, attachment) of every command.
    """

    def __init__(self, views: list[SpecView], credentials: Credentials | None) -> None:
        self.views = views
        self.credentials = credentials
        self.replies: list[list[dict[str, Any] | Exception]] = []
        self.sent: list[tuple[list[str], bytes]] = []

    def specs(self) -> list[SpecView]:
        return self.views

    async def execute(
        self, argv: list[str], confirmed: bool, attachment: bytes = b""
    ) -> AsyncIterator[dict[str, Any]]:
        del confirmed
        self.sent.append((argv, attachment))
        for item in self.replies.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    async def with_session(self, step):
        return await step("channel", "token")


class Screen:
    """A shell and what it has shown."""

    def __init__(self, transport: Scripted, **options: Any) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.shell = Shell(transport, out=self.out, err=self.err, env={}, **options)

    @property
    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


@pytest.fixture
def views(console: Console) -> list[SpecView]:
    return console.register.views()


@pytest.fixture(scope="session")
def credentials(federation) -> Credentials:
    return Credentials.open(federation.open("amy"), federation.passphrase("amy"))


@pytest.fixture
def transport(views, credentials) -> Scripted:
    return Scripted(views, credentials)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flplatform.admin.console.exchange.FIRST_PAUSE_S", 0.01)
