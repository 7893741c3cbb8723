"""A TCP proxy on loopback that stands for a bad network; in a thread with a loop of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

T = TypeVar("T")
STEP_BYTES = 1 << 16


@dataclass
class Weather:
    """What the network does to all connections, and to those that come.

    Attributes:
        delay_s: each piece is so much later, both ways.
        cut_after: a connection is reset after so many bytes, both ways together.
        stop_up: nothing more reaches the server, and nobody is told.
        stop_down: nothing more reaches the client, and nobody is told.
        refuse: connections are reset as soon as they are made.
        bytes_s: how much passes each way in a second.
    """

    delay_s: float = 0.0
    cut_after: int | None = None
    stop_up: bool = False
    stop_down: bool = False
    refuse: bool = False
    bytes_s: float | None = None


class Proxy:
    """Passes connections on to a port of this host, through the weather.

    Attributes:
        port: where it listens.
        weather: may be changed at any time, see `change`.
        made: how many connections were made.
        passed: how many bytes have been passed on, both ways.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.made = self.passed = 0
        self.weather = Weather()
        self._lost: set[asyncio.StreamWriter] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def change(self, **settings: Any) -> None:
        """Have another weather."""
        self._do(self._change(Weather(**settings)))

    async def _change(self, weather: Weather) -> None:
        self.weather = weather
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def cut(self) -> int:
        """Reset all connections; return how many."""
        return self._do(self._cut())

    async def _cut(self) -> int:
        count = len(self._open)
        for writer in list(self._open):
            writer.transport.abort()
        return count

    def lose(self) -> None:
        """Make the connections of now half-open for good: nothing passes, nobody is told."""
        self._do(self._lose())

    async def _lose(self) -> None:
        self._lost |= self._open

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(client)
        self.made += 1
        passed = [0]
        try:
            if self.weather.refuse:
                return
            from_server, server = await asyncio.open_connection("127.0.0.1", self.target)
            self._open.add(server)
            try:
                up = asyncio.create_task(self._pass(reader, server, True, passed, client))
                down = asyncio.create_task(self._pass(from_server, client, False, passed, client))
                try:
                    await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in (up, down):
                        each.cancel()
                    await asyncio.gather(up, down, return_exceptions=True)
            finally:
                self._open.discard(server)
                server.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(client)
            self._lost.discard(client)
            client.transport.abort()
            self._tasks.discard(task)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up: bool,
        passed: list[int],
        client: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(STEP_BYTES):
                while client in self._lost:
                    await asyncio.sleep(3600)
                while self.weather.stop_up if up else self.weather.stop_down:
                    await self._changed.wait()
                if self.weather.delay_s:
                    await asyncio.sleep(self.weather.delay_s)
                passed[0] += len(piece)
                cut_after = self.weather.cut_after
                if cut_after is not None and passed[0] > cut_after:
                    return
                for start in range(0, len(piece), 1024) if self.weather.bytes_s else (0,):
                    part = piece[start : start + 1024] if self.weather.bytes_s else piece
                    writer.write(part)
                    await writer.drain()
                    self.passed += len(part)
                    if pace := self.weather.bytes_s:
                        await asyncio.sleep(len(part) / pace)
