"""Writing a blob behind the back of the stream that brings it."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

from flplatform.core.errors import InvalidArgumentError
from flplatform.core.ports import BlobWriter

WAITING_CHUNKS = 4
"""Chunks of one blob that may wait for those before them to be written."""


class Behind:
    """Writes what has come behind the stream's back, in order, without a thread hop per chunk.

    A writer belongs to one thread at a time: whatever is next is done after the work in flight,
    never beside it.
    """

    def __init__(self, workers: Executor, writer: BlobWriter) -> None:
        self._workers = workers
        self._writer = writer
        self._lock = threading.Lock()
        self._chunks: deque[bytes] = deque()
        self._writing = False
        self.work: Future[None] | None = None

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
            if begin and self.work is not None:
                self.work.result()
            self._chunks.append(chunk)
            self._writing = True
        if begin:
            self.work = self._workers.submit(self._write)

    async def drain(self) -> None:
        """Wait until everything is written."""
        if self.work is not None:
            await asyncio.wrap_future(self.work)

    async def finish(self, end: Callable[[], None]) -> None:
        """Let the writer end, and wait for it."""
        self.work = self._workers.submit(end)
        await self.drain()

    def give_up(self, end: Callable[[], None]) -> None:
        """Let the writer end as soon as nothing is at work on it; nobody waits for it."""
        if self.work is None or self.work.done():
            self._workers.submit(end)
        else:
            self.work.add_done_callback(lambda _: end())

    def _write(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._chunks:
                        self._writing = False
                        return
                    chunk = self._chunks.popleft()
                self._writer.write(chunk)
        except BaseException:
            with self._lock:
                self._writing = False
            raise
