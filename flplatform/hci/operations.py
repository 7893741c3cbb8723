"""The commands under way, and what the long ones among those that ended have said."""

import asyncio
import dataclasses
import json
import secrets
import time
from collections import deque
from collections.abc import Callable

from flplatform.core.errors import NotFoundError, ResourceExhaustedError
from flplatform.hci.connection import Item
from flplatform.hci.sessions import AdminSession

LONG_S = 3.0
"""A command that lasts so long is told its id, and its reply is kept."""

STOPPING = "the server is stopping"
"""Why a command was cancelled."""

MAX_KEPT = 100
MAX_KEPT_BYTES = 256 * 1024
KEEP_S = 3600.0
"""How many ended commands are kept, how much of each reply, and for how long."""


@dataclasses.dataclass(eq=False)
class Operation:
    """One command, under way or ended.

    Attributes:
        id: the command's correlation id.
        session: who asked.
        command: name of the command, or what was typed for it.
        started: monotonic seconds.
        line: the words that were typed, cut to a line.
        detachable: whether it goes on without a reader.
        cancelled: why it was cancelled, or "".
        task: what carries it out.
        long: whether its reply is kept when it has ended.
        transient: whether its reply is never kept.
        ended: monotonic seconds; None while it is under way.
        exit_code: of its reply; None before.
        items: the last part of its reply.
        dropped: items that the part has lost.
        progress: the last item of that type.
    """

    id: str
    session: AdminSession
    command: str
    started: float
    line: str = ""
    detachable: bool = False
    cancelled: str = ""
    task: asyncio.Task[None] | None = None
    long: bool = False
    transient: bool = False
    ended: float | None = None
    exit_code: int | None = None
    items: deque[Item] = dataclasses.field(default_factory=deque)
    dropped: int = 0
    progress: Item | None = None
    _sizes: deque[int] = dataclasses.field(default_factory=deque)
    _kept_bytes: int = 0

    @property
    def state(self) -> str:
        """`running`, `ended` or `cancelled`."""
        return "running" if self.ended is None else "cancelled" if self.cancelled else "ended"

    def keep(self, item: Item) -> None:
        """Keeps an item of the reply, and drops the oldest beyond the limit."""
        if self.transient:
            return
        match item["type"]:
            case "done":
                self.exit_code = item["exit_code"]
            case "progress":
                self.progress = item
            case "row" | "table" | "text" | "error" | "plot" | "data":
                size = len(json.dumps(item))
                self.items.append(item)
                self._sizes.append(size)
                self._kept_bytes += size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self.items.popleft()
            self._kept_bytes -= self._sizes.popleft()
            self.dropped += 1


class Operations:
    """The commands of one event loop.

    Args:
        max_per_session: commands that one session may have under way.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, max_per_session: int = 16, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._max_per_session = max_per_session
        self._live: dict[str, Operation] = {}
        self._ended: dict[str, Operation] = {}

    def open(self, session: AdminSession, command: str, line: str = "") -> Operation:
        """An operation that is listed as soon as it is given its task by `start`."""
        return Operation(secrets.token_hex(8), session, command, self.clock(), line or command)

    def start(self, operation: Operation, task: asyncio.Task[None]) -> None:
        """Lists an operation; when its task ends it stays listed if it was long."""
        operation.task = task
        self._live[operation.id] = operation
        task.add_done_callback(lambda _: self._end(operation))

    def _end(self, operation: Operation) -> None:
        self._live.pop(operation.id, None)
        operation.ended = self.clock()
        operation.task = None
        if operation.long:
            self._ended[operation.id] = operation
            while len(self._ended) > MAX_KEPT:
                del self._ended[next(iter(self._ended))]

    def check_limit(self, session_id: str) -> None:
        """Refuses one command too many.

        Raises:
            ResourceExhaustedError: the session has more under way than it may.
        """
        if len(self.of(session_id)) > self._max_per_session:
            raise ResourceExhaustedError(
                f"this session has {self._max_per_session} commands under way",
                hint="type ops to see them",
            )

    def live(self) -> list[Operation]:
        """Those under way, oldest first."""
        return list(self._live.values())

    def of(self, session_id: str) -> list[Operation]:
        """Those that one session has under way, oldest first."""
        return [operation for operation in self.live() if operation.session.id == session_id]

    def listed(self, user: str = "") -> list[Operation]:
        """Those under way and the long ones that ended lately, oldest first.

        Args:
            user: whose; "" for everybody's.
        """
        now = self.clock()
        for old in [o for o in self._ended.values() if now - (o.ended or 0.0) > KEEP_S]:
            del self._ended[old.id]
        both = [*self._ended.values(), *self._live.values()]
        both.sort(key=lambda operation: operation.started)
        return [operation for operation in both if user in ("", operation.session.user)]

    def find(self, operation_id: str, user: str = "") -> Operation:
        """A listed operation by its id.

        Raises:
            NotFoundError: there is none of this id, or it is not the user's.
        """
        for operation in self.listed(user):
            if operation.id == operation_id:
                return operation
        raise NotFoundError(
            f"no command {operation_id!r} is under way or was lately", hint="type ops to see them"
        )

    def cancel(self, operation: Operation, reason: str) -> None:
        """Cancels an operation; its reader is told why."""
        if operation.task is not None and not operation.cancelled:
            operation.cancelled = reason
            operation.task.cancel()

    def end_session(self, session: AdminSession) -> None:
        """Cancels what a closed session has under way, but for what survives its reader."""
        for operation in self.of(session.id):
            if not operation.detachable:
                self.cancel(operation, "the session has ended")

    async def close(self) -> None:
        """Cancels all and waits for their ends."""
        tasks = [operation.task for operation in self.live() if operation.task is not None]
        for operation in self.live():
            self.cancel(operation, STOPPING)
        if tasks:
            await asyncio.wait(tasks)
