"""A console with its server in one process, for tests at a real terminal: no federation behind it.

python -m tests.support.toy_console HISTORY
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flplatform.hci import AdminServer, AdminSession, CommandRegister, CommandSpec, argument
from flplatform.hci.connection import Connection, Item
from flplatform.hci.prompt import interact
from flplatform.hci.shell import Shell
from flplatform.hci.view import SpecView


@dataclass(frozen=True)
class Sites:
    """Of `look`."""

    sites: tuple[str, ...] = argument(help="sites", complete="site", rest=True, default=())


class Things:
    """Commands that do what a terminal must stand."""

    name = "things"
    summary = "for tests"

    def __init__(self) -> None:
        self.looks = 0

    def commands(self) -> list[CommandSpec[Any]]:
        """Look, drop after a question, hang."""
        look = CommandSpec("look", "looks at sites", Sites, self._look, "view", False, ("look a",))
        drop = CommandSpec(
            "drop", "drops sites", Sites, self._look, "view", True, ("drop a",), self._ask
        )
        hang = CommandSpec("hang", "never ends", Sites, self._hang, "view", False, ("hang",))
        return [look, drop, hang]

    async def _look(self, connection: Connection, args: Sites) -> None:
        self.looks += 1
        for site in args.sites:
            await connection.row(site, {"look": self.looks, "since_s": 1.25})

    async def _ask(self, args: Sites) -> str:
        return f"drop {', '.join(args.sites)}. Continue?"

    async def _hang(self, connection: Connection, _: Sites) -> None:
        await connection.text("hanging")
        await asyncio.Event().wait()


class Allowing:
    """Lets everybody do everything, and writes nothing down."""

    def check(self, session: AdminSession, permission: str, command: str, args: object) -> None:
        """Allow it."""

    def record(self, actor: Mapping[str, str], action: str, decision: str, **more: Any) -> None:
        """Forget it."""


class Inside:
    """`hci.shell.Transport` without a wire."""

    def __init__(self) -> None:
        self.things = Things()
        self.server = AdminServer(CommandRegister([self.things]), Allowing(), Allowing())
        self.session = AdminSession("s", "amy", "lead", "a", "here", "f", 0.0, 0.0)
        self.shown = 0

    def specs(self) -> list[SpecView]:
        """All commands."""
        return self.server.register.views()

    def execute(self, argv: list[str], confirmed: bool) -> AsyncGenerator[Item, None]:
        """Carry a command out."""
        return self.server.execute(self.session, argv, confirmed=confirmed)

    async def complete(self, kind: str, prefix: str) -> list[str]:
        """Two sites."""
        return ["cleveland", "hungary"]

    async def refresh(self) -> None:
        """Look."""
        self.shown = self.things.looks

    def prompt(self) -> str:
        """How often was looked, as of the last refresh."""
        return f"toy {self.shown} > "

    def toolbar(self) -> str:
        """The same all the time."""
        return "the last event"


async def main() -> int:
    """Serve one user at this terminal."""
    transport = Inside()
    code = await interact(Shell(transport), history=Path(sys.argv[1]))
    await transport.server.close()
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
