"""Histories by the thousand: seeds shared out over processes, told in their order."""

import os
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import count, islice
from multiprocessing import get_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.history import Told

SHARE = 16
"""So many seeds are handed to a process at a time."""


def play_all(
    seeds: str, jobs: int, until: float, mutation: str = ""
) -> Generator["Told", None, None]:
    """Play seeds; yield what they told, in the order of seeds however many processes play.

    Args:
        seeds: FIRST:END, where END may be missing.
        jobs: how many processes; 0 for one a core.
        until: begin nothing after this time of `time.monotonic`.
        mutation: how to break the program in other processes than this one.
    """
    first, _, end = seeds.partition(":")
    left = iter(range(int(first), int(end))) if end else count(int(first))
    jobs = jobs or len(os.sched_getaffinity(0))
    if jobs == 1:
        while time.monotonic() < until and (some := list(islice(left, 1))):
            yield from _play(some)
        return
    at_work: deque[Future[list[Told]]] = deque()
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (mutation,))
    try:
        while True:
            while len(at_work) < 2 * jobs and time.monotonic() < until:
                if not (some := list(islice(left, SHARE))):
                    break
                at_work.append(pool.submit(_play, some))
            if not at_work:
                return
            yield from at_work.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(mutation: str) -> None:
    """Begin a process; who started it hears of Ctrl-C and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from tests.simulation import mutations

    if mutation:
        mutations.apply(mutation)


def _play(seeds: Sequence[int]) -> list["Told"]:
    from tests.simulation.history import play

    return [play(seed) for seed in seeds]
