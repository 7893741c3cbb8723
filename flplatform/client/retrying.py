"""Which errors pass by themselves, and steps that are tried until they do."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flplatform.core.errors import InternalError, ResourceExhaustedError, UnavailableError
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


async def persist(what: str, step: Callable[[], Awaitable[T]], longest_s: float) -> T:
    """Do `step` until it fails neither by connection nor server nor a shortage of this machine.

    Args:
        what: names it in the log.
        step: what is done.
        longest_s: longest pause between two tries.

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
            await asyncio.sleep(pause)
