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
"""So many failures in a row are nothing to speak of."""

T = TypeVar("T")


def backoff_s(attempt: int, longest_s: float) -> float:
    """Return a random pause before attempt number `attempt` (from 0): full jitter."""
    return random.uniform(0, min(longest_s, 0.2 * 2 ** min(attempt, 16)))  # noqa: S311


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
            level = logging.DEBUG if attempt < QUIET else logging.WARNING
            log.log(level, "%s: next try in %.1f s: %s", what, pause, error)
            attempt += 1
            await asyncio.sleep(pause)
