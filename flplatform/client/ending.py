"""Ends runs at their site, whatever gets in the way; and who has a place meanwhile."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from flplatform.client.resuming import WaitingRun
from flplatform.client.retrying import insist
from flplatform.client.run_folders import RunFolders
from flplatform.client.site_run import SiteRun
from flplatform.client.spool import Spool
from flplatform.files.removal import remove
from flplatform.files.threads import in_thread

log = logging.getLogger(__name__)


class Seats:
    """Which runs may have a process; one that ends keeps its seat until that is gone."""

    def __init__(self) -> None:
        self._taken: set[SiteRun] = set()
        self._ending: set[SiteRun] = set()
        self._left = asyncio.Condition()

    async def take(self, run: SiteRun) -> None:
        """Wait until runs that are ending leave room for the process of this one."""
        environment = run.package.job.environment
        most = run.plan.environment.max_runs

        def there_is_room() -> bool:
            taken = {one for one in self._taken if one.package.job.environment == environment}
            return run in taken or len(taken) < most or not taken & self._ending

        async with self._left:
            if not there_is_room():
                run.troubles.held_up = "a run before it ends"
                await self._left.wait_for(there_is_room)
                run.troubles.held_up = ""
            self._taken.add(run)

    def end(self, run: SiteRun) -> None:
        """Note that a run is ending."""
        self._ending.add(run)

    async def leave(self, run: SiteRun) -> None:
        """Free the seat of a run whose process is gone."""
        async with self._left:
            self._taken.discard(run)
            self._ending.discard(run)
            self._left.notify_all()


class Endings:
    """Ends runs, each beside everything else; what fails is tried again until it is done.

    Args:
        folders: has the runs' folders.
        spool: has their results.
        stop: ends the tasks of a run and all else that is done for it.
        on_end: hears of every run that has ended, after its last line.
        sweep: deletes, in a thread, what its process has left elsewhere.
        seats: who may have a process.
        longest_s: longest pause between two tries.
    """

    def __init__(
        self,
        folders: RunFolders,
        spool: Spool,
        stop: Callable[[int], Awaitable[None]],
        on_end: Callable[[int], None],
        sweep: Callable[[int], None],
        seats: Seats,
        longest_s: float,
    ) -> None:
        self._folders = folders
        self._spool = spool
        self._stop = stop
        self._on_end = on_end
        self._sweep = sweep
        self._seats = seats
        self._longest_s = longest_s
        self._closing = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._deletions: set[asyncio.Task[bool]] = set()
        self._deleting = asyncio.Lock()
        """Held while one is deleted: the threads are there for everything else as well."""

    def begin(self, run: SiteRun | WaitingRun) -> None:
        """Begin to end a run: its tasks, its process, its results and its folder."""
        if isinstance(run, SiteRun):
            self._seats.end(run)
        self._do(run.run, self._end(run))

    def forget(self, number: int) -> None:
        """Begin to remove what a start has left that was given up."""
        self._do(number, self._retire(number))

    def _do(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"end run {number}")
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def until_over(self, number: int) -> None:
        """Wait until a run that is ending is over for good; what it leaves is deleted then."""
        if number in self._tasks:
            await asyncio.shield(self._tasks[number])

    async def _end(self, run: SiteRun | WaitingRun) -> None:
        async def stop() -> None:
            try:
                await self._stop(run.run)
            finally:
                if isinstance(run, SiteRun):
                    await run.close()

        if not await self._insist(f"end run {run.run}", stop):
            return
        if isinstance(run, SiteRun):
            await self._seats.leave(run)
        try:
            self._on_end(run.run)
        except Exception:
            log.exception("run %d: those who follow its log do not hear of its end", run.run)
        await self._insist(f"sweep behind run {run.run}", lambda: in_thread(self._sweep, run.run))
        await self._retire(run.run)

    async def _retire(self, number: int) -> None:
        """Make sure that nothing of a run is ever found again."""
        leftover = self._folders.leftover()
        what = f"forget run {number}"
        if await self._insist(what, lambda: in_thread(self._folders.retire, number, leftover)):
            self.delete(leftover)
        await self._insist(what, lambda: in_thread(self._spool.drop_run, number))

    def delete(self, leftover: Path) -> None:
        """Begin to delete what nobody needs; if this process ends first, the next one does it."""
        if self._closing.is_set():
            return

        async def step() -> None:
            async with self._deleting:
                await asyncio.to_thread(remove, leftover)

        what = f"delete {leftover.name}"
        task = asyncio.create_task(self._insist(what, step), name=what)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _insist(self, what: str, step: Callable[[], Awaitable[object]]) -> bool:
        return await insist(what, step, self._longest_s, self._closing)

    async def close(self) -> None:
        """Do what is left once more and no further: the rest is for the next process."""
        self._closing.set()
        for task in self._deletions:
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._deletions, return_exceptions=True)
