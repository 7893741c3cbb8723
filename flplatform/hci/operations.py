"""The commands under way: who asked, since when, and how they are cancelled."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable

from flplatform.core.errors import NotFoundError, ResourceExhaustedError
from flplatform.hci.sessions import AdminSession


@dataclasses.dataclass(eq=False)
class Operation:
    """One command under way.

    Attributes:
        id: the command's correlation id.
        session: who asked.
        command: name of the command, or what was typed for it.
        started: monotonic seconds.
        detachable: whether it goes on without a reader.
        cancelled: why it was cancelled, or "".
        task: what carries it out.
    """

    id: str
    session: AdminSession
    command: str
    started: float
    detachable: bool = False
    cancelled: str = ""
    task: asyncio.Task[None] | None = None


class Operations:
    """The commands under way in one event loop.

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

    def open(self, session: AdminSession, command: str) -> Operation:
        """An operation that is listed as soon as it is given its task by `start`."""
        return Operation(secrets.token_hex(8), session, command, self.clock())

    def start(self, operation: Operation, task: asyncio.Task[None]) -> None:
        """Lists an operation until its task ends."""
        operation.task = task
        self._live[operation.id] = operation
        task.add_done_callback(lambda _: self._live.pop(operation.id, None))

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
        """All, oldest first."""
        return list(self._live.values())

    def of(self, session_id: str) -> list[Operation]:
        """Those of one session, oldest first."""
        return [operation for operation in self.live() if operation.session.id == session_id]

    def find(self, operation_id: str, session_id: str) -> Operation:
        """An operation of this session by its id.

        Raises:
            NotFoundError: the session has none of this id.
        """
        operation = self._live.get(operation_id)
        if operation is None or operation.session.id != session_id:
            raise NotFoundError(f"no command {operation_id!r} of this session is under way")
        return operation

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
            self.cancel(operation, "the server is stopping")
        if tasks:
            await asyncio.wait(tasks)
