"""Ended runs: read from the log when somebody looks back, and the last few kept."""

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from flplatform.algorithms.workflows import RunState
from flplatform.core.errors import FailedPreconditionError
from flplatform.files.threads import in_thread
from flplatform.server.ledger import RunSummary
from flplatform.server.run_actor import RunActor

RECENT_RUNS = 8
"""Ended runs kept in memory for reading."""

RECENT_STATES = 32
"""Ended runs whose state is kept to judge what sites say of them; a state holds no events."""

T = TypeVar("T")


class PastRuns:
    """Ended runs for operators, whole, and what judges the word of a site. On the event loop.

    Args:
        load: reads a run; blocks, in any thread.
        replay: reads no more than a run's state; blocks, in any thread.
    """

    def __init__(self, load: Callable[[int], RunActor], replay: Callable[[int], RunState]) -> None:
        self.whole = Kept(load, RECENT_RUNS)
        self._states = Kept(replay, RECENT_STATES)
        self._for_sites = asyncio.Lock()
        self._targets: dict[int, tuple[str, ...]] = {}

    async def state_for(self, site: str, summary: RunSummary) -> RunState:
        """Return the state of an ended run to judge what a site says of it.

        A site may speak of any run, and as often as it likes: one log at a time is read for all.

        Raises:
            FailedPreconditionError: the site was no target of the run.
            FLError: its log cannot be read.
        """
        self._demand_target(site, summary)
        if (found := self._states.find(summary.run)) is not None:
            return found
        async with self._for_sites:
            self._demand_target(site, summary)  # they may be known by now
            state = await self._states.read(summary.run)
        self.note_targets(state)
        return state

    def note_targets(self, state: RunState) -> None:
        """Remember whom a run was meant for, for as long as this process lives."""
        self._targets[state.run] = tuple(sys.intern(site) for site in state.targets)

    def _demand_target(self, site: str, summary: RunSummary) -> None:
        if site not in self._targets.get(summary.run, (site,)):
            raise FailedPreconditionError(
                f"run {summary.run} is {summary.status}: {summary.reason}", rule="run_ended"
            )


class Kept(Generic[T]):
    """What is read of runs, those looked at last kept. Lives on the event loop.

    Args:
        load: reads it; blocks, in any thread.
        most: how many are kept.
    """

    def __init__(self, load: Callable[[int], T], most: int) -> None:
        self._load = load
        self._most = most
        self._kept: OrderedDict[int, T] = OrderedDict()
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, run: int) -> T | None:
        """Return what is kept of a run."""
        if run in self._kept:
            self._kept.move_to_end(run)
        return self._kept.get(run)

    def get(self, run: int) -> T:
        """Return what is known of a run; unless it is kept, this waits for the disk.

        Raises:
            FLError: its log cannot be read.
        """
        if (found := self.find(run)) is not None:
            return found
        return self._keep(run, self._load(run))

    async def read(self, run: int) -> T:
        """As `get`, but the log is read in a thread, once for all who ask meanwhile.

        Raises:
            FLError: its log cannot be read.
        """
        turn = self._turns.setdefault(run, asyncio.Lock())
        async with turn:
            if (found := self.find(run)) is not None:
                return found
            return self._keep(run, await in_thread(self._load, run))

    def _keep(self, run: int, value: T) -> T:
        self._kept[run] = value
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return value
