"""The parent's end of the sockets to the processes that run a job's code: one, or several."""

import asyncio
import contextlib
import hmac
import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from flplatform.client.frames import Order, Start, encode
from flplatform.client.ranks import Answers, failure_of
from flplatform.client.replies import (
    Done,
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
FAILURE_GRACE_S = 1.0
"""For what other ranks have to say after one has failed: theirs may be the cause."""
_CREDENTIALS = struct.Struct("3i")


class Conversation:
    """Listens for the processes, lets in nobody else, gives them tasks and hears their replies.

    There is one unless `start` says otherwise. Of several, each is one rank, and each task is
    given to all of them, see `client.ranks`.

    Args:
        start: what each process is told once all are let in; the rank is filled in.
        secret: what they must know; a peer must also be of this user.
        on_phase: hears what the process is doing.
        on_metric: hears name, value and step of what the code logs.
        note: takes a line for the run's log.

    Attributes:
        ready: resolves when the job's code is loaded, with None or why it cannot be.
        over: resolves when a process has hung up or broken the protocol; after `stop`, when all
            have hung up.
        fault: how the protocol was broken, if it was.
        lost: which of several ranks hung up first, if one did.
        peers: the processes that were let in, by rank.
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
        self.lost = ""
        self.peers: dict[int, psutil.Process | None] = {}
        self._processes = start.world_size
        self._loaded_ranks: set[int] = set()
        self._answers: Answers | None = None
        self._reply: asyncio.Future[Result | Failure] = loop.create_future()
        self._stopping = False
        self._server: asyncio.Server | None = None
        self._secret_file: Path | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def listen(self, path: Path, secret_file: Path | None = None) -> None:
        """Wait for the processes at a socket; returns at once.

        Args:
            path: of the socket.
            secret_file: deleted when all are let in, before any job code runs.

        Raises:
            OSError: there can be no socket at this path.
        """
        self._secret_file = secret_file
        # Known before the first pause: whoever is cancelled there closes it.
        self._server = await asyncio.start_unix_server(self._connected, path, start_serving=False)
        await self._server.start_serving()

    @property
    def begun(self) -> bool:
        """Whether all processes were let in."""
        return len(self.peers) == self._processes

    def order(self, order: Order) -> "asyncio.Future[Result | Failure]":
        """Give the processes a task; what is returned resolves with their reply."""
        self._reply = asyncio.get_running_loop().create_future()
        self._answers = Answers(order.task, self._processes)
        for rank in self._writers:
            self._send(rank, "task", asdict(order))
        return self._reply

    def stop(self) -> None:
        """Tell the processes that there will be no more tasks."""
        self._stopping = True
        for rank in self._writers:
            self._send(rank, "stop", {})

    def close(self) -> None:
        """Listen no more and hang up."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers.values():
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            rank = await self._admit(reader, writer)
            if rank is None:
                self._note("a connection was refused: not this run's process")
            else:
                await self._converse(rank, reader)
        finally:
            writer.close()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> int | None:
        """Return the rank of a process that may come in; None if it may not."""
        peer: socket.socket = writer.get_extra_info("socket")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(credentials)
        if user != os.geteuid():
            return None
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                hello = await read_reply(reader)
        except (TimeoutError, InvalidArgumentError, EOFError, ConnectionError):
            return None
        if not isinstance(hello, Hello) or hello.rank >= self._processes:
            return None
        known = hmac.compare_digest(hello.secret.encode(), self._secret.encode())
        if not known or self._server is None or hello.rank in self.peers:
            return None
        self._writers[hello.rank] = writer
        self.peers[hello.rank] = None
        with contextlib.suppress(psutil.Error, OSError):  # no descriptor is left to look at it
            self.peers[hello.rank] = psutil.Process(pid)
        if self.begun:
            self._server.close()
            self._begin()
        return hello.rank

    def _begin(self) -> None:
        """Tell all processes what to run: from now on the job's code may do anything."""
        if self._secret_file is not None:
            self._secret_file.unlink(missing_ok=True)
        for rank in self._writers:
            self._send(rank, "start", asdict(replace(self._start, rank=rank)))

    async def _converse(self, rank: int, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._handle(rank, await read_reply(reader))
                await asyncio.sleep(0)  # a flood of frames must leave time for all else
        except (EOFError, ConnectionError):
            pass  # the process has ended, or wants no more
        except InvalidArgumentError as error:
            self.fault = f"broke the protocol: {error}"
        finally:
            del self._writers[rank]
            if not self.over.done() and not (self._stopping and self._writers and not self.fault):
                self.lost = f"rank {rank}" if self._processes > 1 and not self._stopping else ""
                self.over.set_result(None)

    def _handle(self, rank: int, reply: Reply) -> None:
        match reply:
            case Phase() | Metric() if rank:
                raise InvalidArgumentError(f"rank {rank} sent a {reply.type}")
            case Phase():
                if reply.phase == "validate_trained":  # the model lies in the box
                    for other in self._writers.keys() - {0}:
                        self._send(other, "trained", {})
                self._on_phase(reply.phase)
            case Metric():
                self._on_metric(reply.name, reply.value, reply.step)
            case Ready():
                self._loaded_ranks.add(rank)
                if len(self._loaded_ranks) == self._processes:
                    self._loaded(None)
            case Failure(task=None):
                if self._processes > 1:
                    reply = failure_of(None, {rank: reply})
                self._note(f"the job's code failed outside a task: {reply.error}")
                self._loaded(TaskFailure(reply.error, reply.traceback))
            case Result() | Done() | Failure():
                self._answer(rank, reply)
            case Hello():
                raise InvalidArgumentError("said hello twice")

    def _answer(self, rank: int, said: Result | Done | Failure) -> None:
        answers = self._answers
        if answers is None or (self._reply.done() and not answers.failed):
            task = answers.task if answers else ""
            raise InvalidArgumentError(f"answered {said.task!r:.100}, not {task!r}")
        answers.add(rank, said)
        if answers.complete:
            self._replied(answers)
        elif answers.failed:
            asyncio.get_running_loop().call_later(FAILURE_GRACE_S, self._replied, answers)

    def _replied(self, answers: Answers) -> None:
        # Where a rank has hung up the others fail because of that: it is a crash, not an answer.
        settled = self.over.done() or self._reply.done()
        reply = answers.reply()
        if answers is self._answers and reply is not None and not settled:
            self._reply.set_result(reply)

    def _loaded(self, failure: TaskFailure | None) -> None:
        if not self.ready.done():
            self.ready.set_result(failure)

    def _send(self, rank: int, kind: str, fields: Mapping[str, Any]) -> None:
        if not self._writers[rank].is_closing():
            self._writers[rank].write(encode(kind, fields))
