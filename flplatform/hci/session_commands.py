"""The commands that every console has: help, whoami, what is under way, and the console's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.core.errors import FailedPreconditionError
from flplatform.hci.connection import Connection
from flplatform.hci.operations import Operations
from flplatform.hci.register import CommandRegister
from flplatform.hci.spec import SESSION_RIGHT, CommandSpec, NoArguments, argument
from flplatform.hci.view import help_page


@dataclass(frozen=True)
class HelpArguments:
    """Of `help`."""

    command: str = argument(help="the command to explain", complete="command", default="")


@dataclass(frozen=True)
class TimeoutArguments:
    """Of `timeout`."""

    seconds: float = argument(help="0 for no limit", metavar="SECONDS", minimum=0)


@dataclass(frozen=True)
class WatchArguments:
    """Of `watch`."""

    command: tuple[str, ...] = argument(
        help="a command that changes nothing, with its arguments",
        complete="command",
        verbatim=True,
    )
    every: float = argument(
        help="seconds between two looks",
        option="--every -n",
        metavar="SECONDS",
        minimum=0.1,
        default=2.0,
    )
    times: int = argument(
        help="looks to take; 0 for no end", option="--times", metavar="N", minimum=0, default=0
    )


@dataclass(frozen=True)
class CancelArguments:
    """Of `cancel`."""

    operation: str = argument(help="its id, from ops", complete="operation", metavar="OP")


class SessionCommands:
    """The session's own commands.

    Args:
        register: the commands that help lists.
        operations: the commands under way.
    """

    name = "session"
    summary = "the session itself"

    def __init__(self, register: CommandRegister, operations: Operations) -> None:
        self._register = register
        self._operations = operations

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """Help, whoami, ops, cancel, and what the console does alone."""
        return [
            CommandSpec(
                name="help",
                summary="lists the commands, or explains one",
                arguments=HelpArguments,
                handler=self._help,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("help", "help watch"),
                aliases=("?",),
                local="help",
            ),
            CommandSpec(
                name="whoami",
                summary="shows who is signed in",
                arguments=NoArguments,
                handler=self._whoami,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("whoami",),
            ),
            CommandSpec(
                name="ops",
                summary="lists what this session has under way",
                arguments=NoArguments,
                handler=self._ops,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("ops",),
            ),
            CommandSpec(
                name="cancel",
                summary="cancels a command that this session has under way",
                arguments=CancelArguments,
                handler=self._cancel,
                permission=SESSION_RIGHT,
                mutating=True,
                examples=("cancel 6f1d0c2ab94e7753",),
            ),
            CommandSpec(
                name="timeout",
                summary="sets how long the console waits for the next part of a reply",
                arguments=TimeoutArguments,
                handler=_console_only,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("timeout 30",),
                local="timeout",
            ),
            CommandSpec(
                name="watch",
                summary="repeats a command until Ctrl-C",
                arguments=WatchArguments,
                handler=_console_only,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("watch ops", "watch --every 5 ops"),
                local="watch",
            ),
            CommandSpec(
                name="bye",
                summary="leaves the console",
                arguments=NoArguments,
                handler=_console_only,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("bye",),
                aliases=("exit", "quit"),
                local="bye",
            ),
        ]

    async def _help(self, connection: Connection, args: HelpArguments) -> None:
        if args.command:
            await connection.text(help_page(self._register.view(args.command)))
        else:
            rows = [(view.module, view.name, view.summary) for view in self._register.views()]
            await connection.table("commands", ("module", "command", "summary"), rows)

    async def _whoami(self, connection: Connection, _: NoArguments) -> None:
        session = connection.session
        age_s = round(self._operations.clock() - session.created, 1)
        await connection.text(
            f"{session.user}  {session.role} of {session.organisation}\n"
            f"from {session.peer}, signed in {age_s:.0f} s ago"
        )
        await connection.data(
            "session",
            {
                "id": session.id,
                "user": session.user,
                "role": session.role,
                "organisation": session.organisation,
                "peer": session.peer,
                "age_s": age_s,
            },
        )

    async def _ops(self, connection: Connection, _: NoArguments) -> None:
        now = self._operations.clock()
        rows = [
            (operation.id, operation.command, round(now - operation.started, 1))
            for operation in self._operations.of(connection.session.id)
        ]
        await connection.table("operations", ("op", "command", "seconds"), rows)

    async def _cancel(self, connection: Connection, args: CancelArguments) -> None:
        operation = self._operations.find(args.operation, connection.session.id)
        self._operations.cancel(operation, f"by {connection.session.user}")
        await connection.row(operation.id, {"command": operation.command})


async def _console_only(_: Connection, __: Any) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
