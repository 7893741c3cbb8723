"""How slow a transfer may be, and how many are at work at once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from flplatform.core.errors import DeadlineExceededError, ResourceExhaustedError
from flplatform.rpc.channel import CHUNK_BYTES

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PaceLimits:
    """What a peer owes to a stream.

    Attributes:
        min_bytes_s: least rate, averaged over `window_s`.
        window_s: seconds after which a stream that brought too little is ended.
    """

    min_bytes_s: float = 64_000.0
    window_s: float = 30.0

    @property
    def due_bytes(self) -> float:
        """Bytes that must move in each window; a chunk that is still under way is let pass."""
        return max(1.0, self.min_bytes_s * self.window_s - CHUNK_BYTES)


class Pace:
    """Holds one stream to its limits; only the time spent waiting for the peer counts.

    Args:
        limits: what the peer owes.
        clock: monotonic seconds.
    """

    def __init__(self, limits: PaceLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._begin()

    def _begin(self) -> None:
        self._left_s = self._limits.window_s
        self._due = self._limits.due_bytes

    async def wait(self, peer: Awaitable[T]) -> T:
        """Wait for the peer, until the window is used up at the latest.

        Raises:
            DeadlineExceededError: the peer is too slow, or silent.
        """
        begun = self._clock()
        try:
            async with asyncio.timeout(self._left_s):
                return await peer
        except TimeoutError:
            limits = self._limits
            moved = limits.due_bytes - self._due
            raise DeadlineExceededError(
                f"only {moved:.0f} bytes moved in {limits.window_s:g} s, "
                f"{limits.due_bytes:.0f} were due",
                rule="progress",
                hint="what came is kept: the transfer goes on from there when it is tried again",
            ) from None
        finally:
            self._left_s -= self._clock() - begun

    def moved(self, count: int) -> None:
        """Note that `count` bytes have moved; enough of them begin a new window."""
        self._due -= count
        if self._due <= 0:
            self._begin()


class Slots:
    """Transfers at work, per caller and in all; the others wait here in order, not on the disk.

    A caller waits for the common slots with as many transfers as it has slots of its own, so
    none of them can fill the queue.

    Args:
        per_caller: transfers of one caller.
        in_all: transfers of all callers.
        wait_s: who has waited for so long is sent away.
    """

    def __init__(self, per_caller: int, in_all: int, wait_s: float = 300.0) -> None:
        self._per_caller = per_caller
        self._wait_s = wait_s
        self._all = asyncio.Semaphore(in_all)
        self._callers: dict[str, asyncio.Semaphore] = {}

    @contextlib.asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Hold one slot of `name` and one of all.

        Raises:
            ResourceExhaustedError: none came free in time.
        """
        mine = self._callers.setdefault(name, asyncio.Semaphore(self._per_caller))
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._wait_s):
                    await held.enter_async_context(mine)
                    await held.enter_async_context(self._all)
            except TimeoutError:
                raise ResourceExhaustedError(
                    f"no transfer slot of {name} and of the server came free in {self._wait_s:g} s",
                    rule="transfer_slots",
                    hint="other transfers are at work; try again",
                ) from None
            yield
