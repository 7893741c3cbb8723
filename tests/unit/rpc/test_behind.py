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
