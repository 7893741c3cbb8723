"""Writing a blob behind the back of the stream that brings it."""

import asyncio
import threading
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

from flplatform.core.errors import InvalidArgumentError
from flplatform.core.ports import BlobWriter

WAITING_CHUNKS = 4
"""Chunks of one blob that may wait for those before them to be written."""


class Behind:
    """Writes what has come behind the stream's back, in order, without a thread hop per chunk.

    A writer belongs to one thread at a time: whatever is next is done after the work in flight,
    never beside it.

    Args:
        workers: threads for the work.
        opening: the work that opens the writer.

    Attributes:
        work: the last on the writer, begun or done.
    """

    def __init__(self, workers: Executor, opening: "Future[BlobWriter]") -> None:
        self._workers = workers
        self._opening = opening
        self._lock = threading.Lock()
        self._chunks: deque[bytes] = deque()
        self._writing = False
        self.work: Future[Any] = opening

    async def opened(self) -> BlobWriter:
        """Return the writer once it is open."""
        return await asyncio.wrap_future(self._opening)

    async def write(self, chunk: bytes) -> None:
        """Write a chunk soon; wait while too many are not written yet.

        Raises:
            InvalidArgumentError: the chunk is empty.
            FLError: an earlier chunk was refused.
        """
        if not chunk:
            raise InvalidArgumentError("is empty", field="chunk")
        if len(self._chunks) >= WAITING_CHUNKS:
            await self.drain()
        with self._lock:
            begin = not self._writing
            if begin:
                self.work.result()
            self._chunks.append(chunk)
            self._writing = True
        if begin:
            self.work = self._workers.submit(self._write)

    async def drain(self) -> None:
        """Wait until everything is written."""
        await asyncio.wrap_future(self.work)

    def finish(self, *, whole: bool) -> None:
        """Let the writer commit what came or, if that is not whole, keep it."""
        writer = self._opening.result()
        self.work = self._workers.submit(writer.commit if whole else writer.suspend)

    def give_up(self, *, discard: bool = False) -> None:
        """Let the writer end as soon as nothing is at work on it, also if nobody waits for it."""
        over: Future[None] = Future()

        def end(_work: object = None) -> None:
            try:
                if not self._opening.cancelled() and self._opening.exception() is None:
                    writer = self._opening.result()
                    (writer.discard if discard else writer.suspend)()
            finally:
                over.set_result(None)

        if self.work.done():
            self._workers.submit(end)
        else:
            self.work.add_done_callback(end)
        self.work = over  # `ended` must not come between the work and this

    async def ended(self) -> None:
        """Wait until the last work on the writer is over, however it ends."""
        work = asyncio.wrap_future(self.work)
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at
        await asyncio.wait([work])

    def _write(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._chunks:
                        self._writing = False
                        return
                    chunk = self._chunks.popleft()
                self._opening.result().write(chunk)
        except BaseException:
            with self._lock:
                self._writing = False
            raise
