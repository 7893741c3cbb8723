"""Which errors pass by themselves, and steps that are tried until they do."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flplatform.core.errors import (
    FLError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.files.shortage import explaining_shortage

log = logging.getLogger(__name__)

RETRIED = (UnavailableError, ResourceExhaustedError, InternalError)
"""Errors after which a site tries again; the others are answers."""

QUIET = 3
"""Of failures in a row this is the first that is told."""

OFTEN = 240
"""After so many, one in so many is told: about one in an hour."""

T = TypeVar("T")


def backoff_s(attempt: int, longest_s: float) -> float:
    """Return a random pause before attempt number `attempt` (from 0): full jitter."""
    return random.uniform(0, min(longest_s, 0.2 * 2 ** min(attempt, 16)))  # noqa: S311


def level_of(attempt: int) -> int:
    """Return how loudly it is told that attempt number `attempt` (from 1) failed: ever more rarely.

    A server may be away over a weekend: a log full of that hides what else went wrong.
    """
    doublings, rest = divmod(attempt, QUIET)
    told = rest == 0 and (doublings.bit_count() == 1 or attempt % OFTEN == 0)
    return logging.WARNING if told else logging.DEBUG


def is_of_space(error: BaseException) -> bool:
    """Return whether an error came for want of space on a disk, this site's or the server's."""
    return isinstance(error, ResourceExhaustedError) and error.rule in ("disk", "reserve_bytes")


async def persist(
    what: str,
    step: Callable[[], Awaitable[T]],
    longest_s: float,
    pause_for: Callable[[float], Awaitable[None]] | None = None,
) -> T:
    """Do `step` until it fails neither by connection nor server nor a shortage of this machine.

    Args:
        what: names it in the log.
        step: what is done.
        longest_s: longest pause between two tries.
        pause_for: pauses for so many seconds, or less if there is a reason; default sleeps.

    Raises:
        FLError: an answer to `step` itself.
    """
    attempt = 0
    while True:
        try:
            with explaining_shortage():
                return await step()
        except RETRIED as error:
            pause = backoff_s(attempt, longest_s)
            attempt += 1
            tries = f"try {attempt} failed, next in {pause:.1f} s"
            log.log(level_of(attempt), "%s: %s: %s", what, tries, error)
            await (pause_for or asyncio.sleep)(pause)


async def insist(
    what: str, step: Callable[[], Awaitable[object]], longest_s: float, ending: asyncio.Event
) -> bool:
    """Do `step` until it does not fail, whatever with: for what must be done in the end.

    Args:
        what: names it in the log.
        step: what is done; the same again goes on from where it failed.
        longest_s: longest pause between two tries.
        ending: set when this process ends: there is no further try.

    Returns:
        Whether it is done.
    """
    attempt = 0
    while True:
        try:
            with explaining_shortage():
                await step()
            return True
        except Exception as error:  # noqa: BLE001 - it must be done whatever comes
            pause = backoff_s(attempt, longest_s)
            attempt += 1
            defect = None if isinstance(error, FLError | OSError) else error
            level = logging.ERROR if attempt == 1 else level_of(attempt)
            tries = f"try {attempt} failed, next in {pause:.1f} s"
            log.log(level, "%s: %s: %s", what, tries, error, exc_info=defect)
        if ending.is_set():
            return False
        try:
            async with asyncio.timeout(pause):
                await ending.wait()
        except TimeoutError:
            continue
