import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flplatform.core.errors import ResourceExhaustedError
from flplatform.core.ports import BlobWriter
from flplatform.rpc.behind import Behind


def test_work_that_fails_when_nobody_asks_any_more_is_no_defect() -> None:
    """No exception is left over that nobody has looked at."""
    gate = threading.Event()
    told: list[Any] = []

    def opening() -> BlobWriter:
        assert gate.wait(60)
        raise ResourceExhaustedError("no room", rule="disk")

    async def leave(workers: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        behind = Behind(workers, workers.submit(opening))
        opened = asyncio.create_task(behind.opened())
        await asyncio.sleep(0)
        opened.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opened
        behind.give_up()
        ended = asyncio.create_task(behind.ended())
        await asyncio.sleep(0)
        gate.set()
        await ended

    async def play() -> None:
        with ThreadPoolExecutor(1) as workers:
            await leave(workers)
        gc.collect()

    asyncio.run(play())
    assert told == []


class SlowWriter:
    """A `BlobWriter` that takes its time, and says what it is at."""

    def __init__(self) -> None:
        self.gates = {"write": threading.Event(), "suspend": threading.Event()}
        self.begun = {"write": threading.Event(), "suspend": threading.Event()}
        self.over: list[str] = []

    def write(self, _chunk: bytes) -> None:
        self._do("write")

    def suspend(self) -> None:
        self._do("suspend")

    def _do(self, what: str) -> None:
        self.begun[what].set()
        assert self.gates[what].wait(60)
        self.over.append(what)


def test_it_has_not_ended_while_the_writer_is_being_let_go() -> None:
    """Whoever begins again at once finds the transfer free."""
    writer: Any = SlowWriter()

    async def play() -> None:
        with ThreadPoolExecutor(2) as workers:
            behind = Behind(workers, workers.submit(lambda: writer))
            await behind.opened()
            await behind.write(b"x")
            assert await asyncio.to_thread(writer.begun["write"].wait, 60)
            behind.give_up()
            writer.gates["write"].set()
            assert await asyncio.to_thread(writer.begun["suspend"].wait, 60)
            ended = asyncio.create_task(behind.ended())
            done, _ = await asyncio.wait([ended], timeout=0.05)
            assert not done
            writer.gates["suspend"].set()
            await ended
            assert writer.over == ["write", "suspend"]

    asyncio.run(play())
