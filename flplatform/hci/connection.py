"""What a handler writes to: a bounded stream of small reply items.

Every item is a JSON-able dict with a "type":

    row       target, status, detail, cells {column: value}
    table     name, columns, rows, marks [[row, column, `best` or `worst`]], verbatim
    text      text
    error     code, message, field, hint, rule
    progress  label, done, total (or null), unit
    plot      name, x, series {name: [y, ...]}
    data      name, value: the machine-readable result
    session   key, value: to be remembered by the console
    reauthenticate  the last item of a command that waits for the password
    confirm   question; the last item of a command that waits for a yes
    operation id: names the command for `ops` and `cancel`, when it is long
    done      exit_code, ok, failed, seconds; the last item of any other command

Numbers are raw; the name of a cell or column tells the unit, see `hci.units`.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        reference: the id under which it is known elsewhere, for the audit.
        max_pending: items that may wait for the reader.
        keep: is shown every item that is sent.

    Attributes:
        exit_code: set by a handler to end with a code of its own; None derives it.
    """

    def __init__(
        self,
        session: AdminSession,
        request: object = None,
        *,
        correlation_id: str = "",
        reference: str = "",
        max_pending: int = 64,
        keep: Callable[[Item], None] = lambda _: None,
    ) -> None:
        self.session = session
        self.request = request
        self.correlation_id = correlation_id
        self.reference = reference
        self.exit_code: int | None = None
        self.statuses: dict[str, int] = {}
        self._error_code: int | None = None
        self._queue: asyncio.Queue[Item] = asyncio.Queue(max_pending)
        self._keep = keep
        self._order: list[str] = []  # targets whose rows have not been sent
        self._held: dict[str, list[Item]] = {}  # rows that wait for those before them

    def in_order(self, targets: Iterable[str]) -> None:
        """Has the rows of these targets sent in this order, whichever comes first."""
        self._order = list(dict.fromkeys(targets))

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
        item: Item = {"type": "row", "target": target, "status": status, "detail": detail}
        item["cells"] = dict(cells or {})
        if target not in self._order:
            await self._send(item)
            return
        self._held.setdefault(target, []).append(item)
        while self._order and self._order[0] in self._held:
            for each in self._held.pop(self._order.pop(0)):
                await self._send(each)

    async def _release(self) -> None:
        """Sends the rows that are held back."""
        order, self._order = self._order, []
        for target in order:
            for each in self._held.pop(target, ()):
                await self._send(each)

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
        self,
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Scalar]],
        *,
        marks: Mapping[tuple[int, int], str] | None = None,
        verbatim: bool = False,
    ) -> None:
        """A table that is not one row per target.

        Args:
            name: its name.
            columns: their names, which tell units.
            rows: cells in the order of the columns.
            marks: (row, column) -> `best` or `worst`, for cells that stand out.
            verbatim: the columns are names from elsewhere; they tell no unit.
        """
        await self._put(
            "table",
            name=name,
            columns=list(columns),
            rows=[list(row) for row in rows],
            marks=[[row, column, mark] for (row, column), mark in (marks or {}).items()],
            verbatim=verbatim,
        )

    async def text(self, text: str) -> None:
        """Lines to read."""
        await self._put("text", text=text)

    async def error(self, error: FLError) -> None:
        """An error of the command itself; without `exit_code` the first one decides the code."""
        if self._error_code is None:
            self._error_code = exit_code_of(error)
        await self._release()
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

    def announce(self) -> None:
        """Tells the id of a command that lasts; left out when the reader is behind."""
        if not self._queue.full():
            self._queue.put_nowait({"type": "operation", "id": self.correlation_id})

    async def replay(self, items: Iterable[Item]) -> None:
        """Sends the items of an earlier reply again; its rows do not count as answers."""
        for item in items:
            await self._send(item)

    async def confirm(self, question: str) -> None:
        """Ends the stream with a question; a yes sends the command again."""
        await self._put("confirm", question=question)

    async def reauthenticate(self) -> None:
        """Ends the stream with a demand for the password; who proves it sends the command again."""
        await self._put("reauthenticate")

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
        if kind not in ("data", "progress", "session"):  # they stand beside the rows
            await self._release()
        await self._send({"type": kind, **fields})

    async def _send(self, item: Item) -> None:
        self._keep(item)
        await self._queue.put(item)
