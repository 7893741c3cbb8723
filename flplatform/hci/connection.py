"""What a handler writes to: a bounded stream of small reply items.

Every item is a JSON-able dict with a "type":

    row       target, status, detail, cells {column: value}
    table     name, columns, rows
    text      text
    error     code, message, field, hint, rule
    progress  label, done, total (or null), unit
    plot      name, x, series {name: [y, ...]}
    data      name, value: the machine-readable result
    session   key, value: to be remembered by the console
    confirm   question; the last item of a command that waits for a yes
    done      exit_code, ok, failed, seconds; the last item of any other command
"""

import asyncio
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeAlias

from flplatform.core.errors import (
    DeadlineExceededError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.hci.sessions import AdminSession

Item: TypeAlias = dict[str, Any]
Scalar: TypeAlias = None | bool | int | float | str
Json: TypeAlias = Scalar | Sequence["Json"] | Mapping[str, "Json"]


class ExitCode(IntEnum):
    """Exit codes of a command; a handler may set others that its domain documents."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    NO_CONNECTION = 4
    TIMEOUT = 124
    INTERRUPTED = 130


def exit_code_of(error: FLError) -> ExitCode:
    """The exit code of a command that ended with this error."""
    match error:
        case InvalidArgumentError():
            return ExitCode.USAGE
        case PermissionDeniedError():
            return ExitCode.REFUSED
        case _:
            return ExitCode.FAILED


def error_item(error: FLError) -> Item:
    """The reply item that carries an error."""
    return {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "field": error.field,
        "hint": error.hint,
        "rule": error.rule,
    }


class Connection:
    """The reply side of one command.

    Items are streamed: when the reader is `max_pending` items behind, writers wait for it.

    Args:
        session: who asks.
        request: the transport's own object (such as the signed command); opaque here.
        correlation_id: the id under which the audit and the logs know this command.
        max_pending: items that may wait for the reader.

    Attributes:
        exit_code: set by a handler to end with a code of its own; None derives it.
    """

    def __init__(
        self,
        session: AdminSession,
        request: object = None,
        *,
        correlation_id: str = "",
        max_pending: int = 64,
    ) -> None:
        self.session = session
        self.request = request
        self.correlation_id = correlation_id
        self.exit_code: int | None = None
        self.statuses: dict[str, int] = {}
        self._error_code: int | None = None
        self._queue: asyncio.Queue[Item] = asyncio.Queue(max_pending)

    async def row(
        self,
        target: str,
        cells: Mapping[str, Scalar] | None = None,
        *,
        status: str = "ok",
        detail: str = "",
    ) -> None:
        """The answer of one target.

        Args:
            target: whose answer.
            cells: column -> value.
            status: `ok`, `error`, `refused`, `no_reply` or `unknown`; all but `ok` are failures.
            detail: the rest of the sentence that the status begins.
        """
        self.statuses[status] = self.statuses.get(status, 0) + 1
        await self._put("row", target=target, status=status, detail=detail, cells=dict(cells or {}))

    async def failed(self, target: str, error: FLError) -> None:
        """The row of a target that answered with an error, or not at all."""
        match error:
            case PermissionDeniedError(rule=rule) if rule:
                await self.row(target, status="refused", detail=f"rule {rule}")
            case PermissionDeniedError():
                await self.row(target, status="refused", detail=error.message)
            case DeadlineExceededError():
                await self.row(target, status="no_reply", detail=error.message)
            case NotFoundError():
                await self.row(target, status="unknown", detail=str(error))
            case _:
                await self.row(target, status="error", detail=str(error))

    async def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Scalar]]
    ) -> None:
        """A table that is not one row per target."""
        await self._put("table", name=name, columns=list(columns), rows=[list(row) for row in rows])

    async def text(self, text: str) -> None:
        """Lines to read."""
        await self._put("text", text=text)

    async def error(self, error: FLError) -> None:
        """An error of the command itself; without `exit_code` the first one decides the code."""
        if self._error_code is None:
            self._error_code = exit_code_of(error)
        await self._send(error_item(error))

    async def progress(self, label: str, done: float, total: float | None, unit: str = "") -> None:
        """How far a long piece of work is; dropped, never waited for, when the reader is behind."""
        if not self._queue.full():
            await self._put("progress", label=label, done=done, total=total, unit=unit)

    async def plot(self, name: str, x: str, series: Mapping[str, Sequence[float]]) -> None:
        """Curves over a common x axis that is labelled `x`."""
        curves = {label: list(values) for label, values in series.items()}
        await self._put("plot", name=name, x=x, series=curves)

    async def data(self, name: str, value: Json) -> None:
        """A machine-readable result; a terminal does not show it."""
        await self._put("data", name=name, value=value)

    async def remember(self, key: str, value: Json) -> None:
        """Tells the console to keep a value for its session."""
        await self._put("session", key=key, value=value)

    async def confirm(self, question: str) -> None:
        """Ends the stream with a question; a yes sends the command again."""
        await self._put("confirm", question=question)

    async def done(self, seconds: float) -> None:
        """Ends the stream: 0 when all is well, 3 when every target refused, else 1 or the error's.

        Args:
            seconds: how long the command took.
        """
        ok = self.statuses.get("ok", 0)
        failed = sum(self.statuses.values()) - ok
        code = self.exit_code if self.exit_code is not None else self._error_code
        if code is None:
            all_refused = failed and self.statuses.get("refused") == failed + ok
            code = ExitCode.REFUSED if all_refused else ExitCode.FAILED if failed else ExitCode.OK
        await self._put("done", exit_code=int(code), ok=ok, failed=failed, seconds=seconds)

    async def next_item(self) -> Item:
        """Waits for the next item; `confirm` or `done` is the last."""
        return await self._queue.get()

    async def _put(self, kind: str, **fields: Any) -> None:
        await self._send({"type": kind, **fields})

    async def _send(self, item: Item) -> None:
        await self._queue.put(item)
