"""Work that nobody waits for, and work that must be carried through although its caller left."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from flplatform.core.errors import FLError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Holds the tasks so that they are neither lost nor left behind. Lives on the event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` in the background, unless all is closed; what it raises is logged."""
        if self._closed:
            work.close()
            return
        task = self._hold(work)

        def done(ended: asyncio.Task[None]) -> None:
            if not ended.cancelled() and (error := ended.exception()):
                known = isinstance(error, FLError)
                log.error("in the background: %s", error, exc_info=None if known else error)

        task.add_done_callback(done)

    async def through(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry `work` through also if the caller leaves: what it appends must be known here."""
        return await asyncio.shield(self._hold(work))

    async def close(self) -> None:
        """End everything."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hold(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
