"""From words to reply items, always in this order.

find, parse, authorise, confirm, audit, handle. A command that changes something is in the audit
before its handler starts, or it does not start; a refusal is in the audit too.
"""

import asyncio
import dataclasses
import json
import logging
import math
import shlex
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from flplatform.core.errors import (
    FailedPreconditionError,
    FLError,
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnavailableError,
)
from flplatform.files.shortage import remedy_at, shortage_in
from flplatform.hci.connection import Connection, ExitCode, Item
from flplatform.hci.grammar import parse
from flplatform.hci.operations import LONG_S, STOPPING, Operation, Operations
from flplatform.hci.register import CommandRegister
from flplatform.hci.session_commands import SessionCommands
from flplatform.hci.sessions import AdminSession
from flplatform.hci.spec import SESSION_RIGHT, CommandSpec

logger = logging.getLogger(__name__)

_LINE = 80  # of what was typed, `ops` shows so many characters


class Authorizer(Protocol):
    """Who may do what."""

    def check(self, session: AdminSession, permission: str, command: str, args: object) -> None:
        """Decides whether the session's user may carry out a command with these arguments.

        Raises:
            PermissionDeniedError: not allowed; `rule` names the rule.
        """
        ...


class AuditTrail(Protocol):
    """The record of what was decided."""

    def record(
        self,
        actor: Mapping[str, str],
        action: str,
        decision: str,
        *,
        reason: str = "",
        details: Mapping[str, str] | None = None,
        correlation_id: str = "",
    ) -> None:
        """Writes one durable entry; called in a worker thread, so it may wait for the disk.

        Args:
            actor: name, role, organisation, fingerprint and peer.
            action: the command.
            decision: `allowed` or `denied`.
            reason: the rule that denied.
            details: `session`, and `arguments` as JSON.
            correlation_id: the id that the log lines and events of this command carry too.

        Raises:
            Exception: it could not be written.
        """
        ...


class AdminServer:
    """Carries out commands; it belongs to one event loop.

    Args:
        register: the commands; the session's own are added to it.
        authorizer: who may do what.
        audit: where decisions are written.
        max_operations: commands that one session may have under way.
        max_pending: reply items that may wait for a reader.
        clock: monotonic seconds.
        reauthenticate_s: age of a password check from which on sensitive commands want a new one.
        all_right: the right to see and cancel what other users have under way.
        prepare: (permission, arguments) → None once what a command needs is at hand; it is
            called before the command is authorised.

    Raises:
        InternalError: a command of the register has the name of one of the session's own.
    """

    def __init__(
        self,
        register: CommandRegister,
        authorizer: Authorizer,
        audit: AuditTrail,
        *,
        max_operations: int = 16,
        max_pending: int = 64,
        clock: Callable[[], float] = time.monotonic,
        reauthenticate_s: float = math.inf,
        all_right: str = "operate",
        prepare: Callable[[str, object], Awaitable[None]] | None = None,
    ) -> None:
        self.register = register
        self.operations = Operations(max_per_session=max_operations, clock=clock)
        register.add(SessionCommands(register, self.operations, self._demand_all))
        self._authorizer = authorizer
        self._audit = audit
        self._max_pending = max_pending
        self._clock = clock
        self._all_right = all_right
        self._prepare = prepare
        self._reauthenticate_s = reauthenticate_s
        self._drains: set[asyncio.Task[None]] = set()

    async def execute(
        self,
        session: AdminSession,
        argv: Sequence[str],
        request: object = None,
        *,
        confirmed: bool = False,
        reference: str = "",
    ) -> AsyncGenerator[Item, None]:
        """Carries out one command and yields its reply items.

        The last item is `done`, or `confirm` when the command needs a yes and has none, or
        `reauthenticate` when it wants the password once more. Errors are
        items, never exceptions. Closing the generator cancels the handler, unless the command
        survives that.

        Args:
            session: who asks.
            argv: name of the command and its words.
            request: the transport's own object; handlers find it in `Connection.request`.
            confirmed: whether the user has said yes to the command's question.
            reference: the id under which the command is known elsewhere, for the audit.
        """
        line = shlex.join(argv)
        line = line if len(line) <= _LINE else line[: _LINE - 1] + "…"
        operation = self.operations.open(session, argv[0] if argv else "", line)
        connection = Connection(
            session,
            request,
            correlation_id=operation.id,
            reference=reference,
            max_pending=self._max_pending,
            keep=operation.keep,
        )

        def lasts() -> None:
            if not operation.transient:
                operation.long = True
                connection.announce()

        announcement = asyncio.get_running_loop().call_later(LONG_S, lasts)
        task = asyncio.create_task(self._carry_out(operation, connection, argv, confirmed))
        self.operations.start(operation, task)
        task.add_done_callback(lambda _: announcement.cancel())
        try:
            last = False
            while not last:
                item = await connection.next_item()
                last = item["type"] in ("done", "confirm", "reauthenticate")
                yield item
        finally:
            if operation.detachable and not task.done():
                operation.long = True
                drain = asyncio.create_task(_drain(connection))
                self._drains.add(drain)
                drain.add_done_callback(self._drains.discard)
            else:
                task.cancel()
                await asyncio.wait([task])

    async def close(self) -> None:
        """Cancels the commands under way, survivors too, and waits for their ends."""
        await self.operations.close()
        if self._drains:
            await asyncio.wait(self._drains)

    async def _carry_out(
        self, operation: Operation, connection: Connection, argv: Sequence[str], confirmed: bool
    ) -> None:
        """Sends items up to the last one, whatever happens, unless the reader has gone."""
        question: str | None = ""
        try:
            question = await self._steps(operation, connection, argv, confirmed)
        except FLError as error:
            await connection.error(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not operation.cancelled and task is not None and task.cancelling():
                raise  # the reader has gone
            reason = operation.cancelled or "by the server"
            if reason == STOPPING:  # as when the connection breaks: it may be tried again
                connection.exit_code = ExitCode.NO_CONNECTION
                await connection.error(
                    UnavailableError(f"cancelled: {reason}", hint="give it again when it is back")
                )
            else:
                connection.exit_code = ExitCode.INTERRUPTED
                await connection.error(FailedPreconditionError(f"cancelled: {reason}"))
        except Exception:
            logger.exception("command %s failed (%s)", operation.command, operation.id)
            await connection.error(
                InternalError(f"internal error {operation.id}; the server's log says more")
            )
        if question is None:
            await connection.reauthenticate()
        elif question:
            await connection.confirm(question)
        else:
            await connection.done(self._clock() - operation.started)

    async def _steps(
        self, operation: Operation, connection: Connection, argv: Sequence[str], confirmed: bool
    ) -> str | None:
        """Carries the command out, or returns the question that must be answered first.

        None asks for the password.
        """
        if not argv:
            raise InvalidArgumentError("no command")
        spec = self.register.find(argv[0])
        if spec.permission != SESSION_RIGHT:  # one can always look and cancel
            self.operations.check_limit(connection.session.id)
        args = parse(argv[1:], spec)
        operation.command = spec.name
        if self._prepare is not None:
            await self._prepare(spec.permission, args)
        await self._authorise(spec, args, connection)
        if spec.confirm is not None and not confirmed and (question := await spec.confirm(args)):
            return question
        if spec.reauthenticate and self._stale(connection.session):
            return None
        if spec.mutating:
            try:
                await self._record(spec, args, connection, "allowed")
            except Exception as error:
                shortage = shortage_in(error)
                logger.error(
                    "the audit cannot be written (%s): %s",
                    operation.id,
                    error,
                    exc_info=None if shortage else error,
                )
                why = f": {shortage.message}" if shortage else ""
                raise UnavailableError(
                    f"nothing was done: the audit cannot be written ({operation.id}){why}",
                    hint=remedy_at(shortage, "the server") if shortage else "",
                ) from error
        operation.detachable = spec.survives_disconnect
        operation.transient = spec.transient
        await spec.handler(connection, args)
        return ""

    def _demand_all(self, session: AdminSession, args: object) -> None:
        """Refuses who may not see and cancel what others have under way."""
        self._authorizer.check(session, self._all_right, "ops", args)

    def _stale(self, session: AdminSession) -> bool:
        return self._clock() - session.proved > self._reauthenticate_s

    async def _authorise(self, spec: CommandSpec[Any], args: Any, connection: Connection) -> None:
        try:
            self._authorizer.check(connection.session, spec.permission, spec.name, args)
        except PermissionDeniedError as error:
            try:
                await self._record(spec, args, connection, "denied", error.rule or error.message)
            except Exception:
                # The refusal stands; that its record is missing is for the operator to see.
                logger.exception("a refusal is not in the audit (%s)", connection.correlation_id)
            raise

    async def _record(
        self,
        spec: CommandSpec[Any],
        args: Any,
        connection: Connection,
        decision: str,
        reason: str = "",
    ) -> None:
        session = connection.session
        await asyncio.to_thread(
            self._audit.record,
            {
                "name": session.user,
                "role": session.role,
                "organisation": session.organisation,
                "fingerprint": session.fingerprint,
                "peer": session.peer,
            },
            spec.name,
            decision,
            reason=reason,
            details={
                "session": session.id,
                "arguments": json.dumps(dataclasses.asdict(args)),
                **({"order": connection.reference} if connection.reference else {}),
            },
            correlation_id=connection.correlation_id,
        )


async def _drain(connection: Connection) -> None:
    """Reads on for a reader that has gone, so that the handler need not wait for one."""
    while (await connection.next_item())["type"] != "done":
        pass
