"""The parent's end of the socket to one run process."""

import asyncio
import contextlib
import hmac
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from flplatform.client.frames import Order, Start, encode
from flplatform.client.replies import (
    Failure,
    Hello,
    Metric,
    Phase,
    Ready,
    Reply,
    Result,
    read_reply,
)
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import TaskFailure

HELLO_TIMEOUT_S = 10.0
_CREDENTIALS = struct.Struct("3i")


class Conversation:
    """Listens for the process, lets in nobody else, gives it tasks and hears its replies.

    Args:
        start: what the process is told once it is let in.
        secret: what it must know; the peer must also be of this user.
        on_phase: hears what the process is doing.
        on_metric: hears name, value and step of what the code logs.
        note: takes a line for the run's log.

    Attributes:
        ready: resolves when the job's code is loaded, with None or why it cannot be.
        over: resolves when the process has hung up or broken the protocol.
        fault: how the protocol was broken, if it was.
        leader: the process that was let in.
    """

    def __init__(
        self,
        start: Start,
        secret: str,
        on_phase: Callable[[str], None],
        on_metric: Callable[[str, float, int | None], None],
        note: Callable[[str], None],
    ) -> None:
        self._start = start
        self._secret = secret
        self._on_phase = on_phase
        self._on_metric = on_metric
        self._note = note
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[TaskFailure | None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.fault = ""
        self.leader: psutil.Process | None = None
        self._pending: tuple[str, asyncio.Future[Result | Failure]] | None = None
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def listen(self, path: Path) -> None:
        """Wait for the process at a socket; returns at once.

        Raises:
            OSError: there can be no socket at this path.
        """
        self._server = await asyncio.start_unix_server(self._connected, path)

    def order(self, order: Order) -> "asyncio.Future[Result | Failure]":
        """Give the process a task; what is returned resolves with its reply."""
        future: asyncio.Future[Result | Failure] = asyncio.get_running_loop().create_future()
        self._pending = order.task, future
        self._send("task", asdict(order))
        return future

    def stop(self) -> None:
        """Tell the process that there will be no more tasks."""
        self._send("stop", {})

    def close(self) -> None:
        """Listen no more and hang up."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await self._admit(reader, writer):
                await self._converse(reader)
            else:
                self._note("a connection was refused: not this run's process")
        finally:
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        peer: socket.socket = writer.get_extra_info("socket")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.geteuid():
            return False
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await read_reply(reader)
        except (TimeoutError, InvalidArgumentError, EOFError, ConnectionError):
            return False
        secret = hello.secret if isinstance(hello, Hello) else ""
        known = hmac.compare_digest(secret.encode(), self._secret.encode())
        if not known or self._server is None or self._writer is not None:
            return False
        self._server.close()
        self._writer = writer
        with contextlib.suppress(psutil.Error):
            self.leader = psutil.Process(pid)
        return True

    async def _converse(self, reader: asyncio.StreamReader) -> None:
        try:
            self._send("start", asdict(self._start))
            while True:
                self._handle(await read_reply(reader))
                await asyncio.sleep(0)  # a flood of frames must leave time for all else
        except (EOFError, ConnectionError):
            pass  # the process has ended, or wants no more
        except InvalidArgumentError as error:
            self.fault = f"broke the protocol: {error}"
        finally:
            if not self.over.done():
                self.over.set_result(None)

    def _handle(self, reply: Reply) -> None:
        match reply:
            case Phase():
                self._on_phase(reply.phase)
            case Metric():
                self._on_metric(reply.name, reply.value, reply.step)
            case Ready():
                self._loaded(None)
            case Failure(task=None):
                self._note(f"the job's code failed outside a task: {reply.error}")
                self._loaded(TaskFailure(reply.error, reply.traceback))
            case Result() | Failure():
                task, future = self._pending or ("", None)
                if future is None or future.done() or reply.task != task:
                    raise InvalidArgumentError(f"answered {reply.task!r:.100}, not {task!r}")
                future.set_result(reply)
            case Hello():
                raise InvalidArgumentError("said hello twice")

    def _loaded(self, failure: TaskFailure | None) -> None:
        if not self.ready.done():
            self.ready.set_result(failure)

    def _send(self, kind: str, fields: Mapping[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(kind, fields))
