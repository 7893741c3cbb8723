"""Starts on their way in: one of each run at a time, and none for longer than was signed."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from weakref import WeakValueDictionary

from flplatform.core.errors import FailedPreconditionError, PermissionDeniedError
from flplatform.security.signing import StartOrder


@dataclass(slots=True, eq=False)
class Start:
    """A start on its way in.

    Attributes:
        limit: when it is given up.
        environment: where it has a place, once there is one.
        status: how its run ended meanwhile.
    """

    run: int
    order: StartOrder
    task: asyncio.Task[Any]
    limit: asyncio.Timeout
    environment: str = ""
    status: str = ""

    @property
    def given_up(self) -> bool:
        """Whether its time is over, or its run."""
        return self.limit.expired()

    def give_up(self, status: str) -> None:
        """Give it up: its run is over."""
        if not self.given_up:
            self.status = status
            self.limit.reschedule(asyncio.get_running_loop().time())


class Starts:
    """Who is on the way in.

    Args:
        skew_s: how far a signer's clock may be off.

    Attributes:
        entered: run → its start, as soon as it is known not to be another's.
    """

    def __init__(self, skew_s: float) -> None:
        self._skew_s = skew_s
        self.entered: dict[int, Start] = {}
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._all: set[Start] = set()
        self._closing = False

    @asynccontextmanager
    async def turn(self, run: int, order: StartOrder) -> AsyncIterator[Start]:
        """Wait for earlier starts of a run; what is done in this context is given up in time.

        An earlier one by another order is given up: the server has forgotten it.

        Raises:
            FailedPreconditionError: the order's time was over, or the run.
        """
        for earlier in self._all:
            if earlier.run == run and earlier.order.submission_id != order.submission_id:
                earlier.give_up("it was started anew")
        left_s = (order.not_after - datetime.now(UTC)).total_seconds()
        task = asyncio.current_task()
        assert task is not None
        start = Start(run, order, task, asyncio.timeout(max(0.0, left_s + self._skew_s)))
        try:
            async with start.limit:
                self._all.add(start)
                async with self._locks.setdefault(run, asyncio.Lock()):
                    yield start
        except TimeoutError:
            if not start.given_up:
                raise
            raise FailedPreconditionError(
                f"run {run} was given up before it began here: "
                + (start.status or f"its start was valid until {order.not_after}"),
                rule="run_ended" if start.status else "signed not_after",
            ) from None
        finally:
            self._all.discard(start)

    @contextmanager
    def enter(self, start: Start) -> Iterator[None]:
        """Count a start as one on its way in."""
        self.entered[start.run] = start
        try:
            yield
        finally:
            if not self._closing:  # else the next process goes on with what has come
                del self.entered[start.run]

    def give_up(self, run: int, status: str) -> None:
        """Give the start of a run up, if there is one on its way in."""
        if start := self.entered.get(run):
            start.give_up(status)

    @property
    def packages(self) -> set[str]:
        """Digests of the packages that are needed."""
        return {f"blake3:{start.order.job_digest}" for start in self.entered.values()}

    @property
    def submissions(self) -> dict[str, int]:
        """Submission id → run."""
        return {start.order.submission_id: run for run, start in self.entered.items()}

    def reserve(self, start: Start, environment: str, busy: int, max_runs: int) -> None:
        """Give a start its place in an environment.

        Args:
            start: whose place it is.
            environment: the environment's name.
            busy: how many of its places are taken.
            max_runs: how many there are.

        Raises:
            PermissionDeniedError: all are taken.
        """
        if busy >= max_runs:
            raise PermissionDeniedError(
                f"{busy} runs are at work in environment {environment!r}",
                rule=f"environments.yml: max_runs = {max_runs}",
            )
        start.environment = environment

    async def close(self) -> None:
        """End all; nobody is answered: the server will ask again."""
        self._closing = True
        tasks = [start.task for start in self._all]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
