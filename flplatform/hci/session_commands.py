"""The commands that every console has: help, whoami, what is under way, and the console's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.core.errors import FailedPreconditionError
from flplatform.hci.connection import Connection
from flplatform.hci.operations import Operation, Operations
from flplatform.hci.register import CommandRegister
from flplatform.hci.sessions import AdminSession
from flplatform.hci.spec import SESSION_RIGHT, CommandSpec, NoArguments, argument
from flplatform.hci.view import help_page, overview


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
class OpsArguments:
    """Of `ops`."""

    operation: str = argument(
        help="id of one: shows what it has said", complete="operation", metavar="OP", default=""
    )
    all: bool = argument(help="those of all users", option="--all", default=False)


@dataclass(frozen=True)
class CancelArguments:
    """Of `cancel`."""

    operation: str = argument(help="its id, from ops", complete="operation", metavar="OP")


class SessionCommands:
    """The session's own commands.

    Args:
        register: the commands that help lists.
        operations: the commands under way.
        demand_all: refuses who may not see and cancel what others have under way.
    """

    name = "session"
    summary = "the session itself"

    def __init__(
        self,
        register: CommandRegister,
        operations: Operations,
        demand_all: Callable[[AdminSession, object], None] = lambda *_: None,
    ) -> None:
        self._register = register
        self._operations = operations
        self._demand_all = demand_all

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
                summary="lists your commands under way and long ones of the last hour",
                arguments=OpsArguments,
                handler=self._ops,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("ops", "ops --all", "ops 6f1d0c2ab94e7753"),
            ),
            CommandSpec(
                name="cancel",
                summary="cancels a command that is under way",
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
                summary="repeats a command until Ctrl-C, which ends it with exit code 0",
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
            await connection.text(overview(self._register.views()))

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

    async def _ops(self, connection: Connection, args: OpsArguments) -> None:
        if args.operation:
            await self._show(connection, self._find(connection, args.operation, args))
            return
        if args.all:
            self._demand_all(connection.session, args)
        now = self._operations.clock()
        columns = ["op", "command", "state", "since_s", "exit_code", "progress"]
        columns += ["user"] * args.all
        rows = [
            (
                operation.id,
                operation.line,
                operation.state,
                round(now - operation.started, 1),
                operation.exit_code,
                _progress(operation),
                operation.session.user,
            )[: len(columns)]
            for operation in self._operations.listed("" if args.all else connection.session.user)
            if operation.id != connection.correlation_id
        ]
        if rows:
            await connection.table("operations", columns, rows)
        else:
            await connection.text("nothing is under way")
        found = [dict(zip(columns, row, strict=True)) for row in rows]
        await connection.data("operations", found)

    async def _show(self, connection: Connection, operation: Operation) -> None:
        """Repeats what a command has said, with its exit code if it has ended."""
        if operation.dropped:
            await connection.text(f"(the first {operation.dropped} parts of the reply are lost)")
        await connection.replay(list(operation.items))
        progress = _progress(operation)
        how = f"{operation.state}{f', {progress}' if progress else ''}"
        if operation.exit_code is not None:
            how = f"{operation.state} with exit code {operation.exit_code}"
            connection.exit_code = operation.exit_code
        await connection.text(f"{operation.line}: {how}")
        found = {"op": operation.id, "state": operation.state, "exit_code": operation.exit_code}
        await connection.data("operation", found)

    def _find(self, connection: Connection, operation_id: str, args: object) -> Operation:
        """An operation of this user, or of another for whom may see them."""
        operation = self._operations.find(operation_id)
        if operation.session.user != connection.session.user:
            self._demand_all(connection.session, args)
        return operation

    async def _cancel(self, connection: Connection, args: CancelArguments) -> None:
        operation = self._find(connection, args.operation, args)
        if operation.ended is not None:
            raise FailedPreconditionError(f"{operation.line} has ended", hint="ops OP shows how")
        self._operations.cancel(operation, f"by {connection.session.user}")
        await connection.row(operation.id, {"command": operation.line})


def _progress(operation: Operation) -> str | None:
    item = operation.progress
    if item is None or operation.ended is not None:
        return None
    total = item["total"]
    done = f"{item['done'] / total:.0%}" if total else f"{item['done']:g} {item['unit']}".rstrip()
    return f"{item['label']} {done}"


async def _console_only(_: Connection, __: Any) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
