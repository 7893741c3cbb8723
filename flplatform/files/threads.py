"""Work in threads that nobody may get ahead of."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from flplatform.core.errors import ResourceExhaustedError

log = logging.getLogger(__name__)

GIVE_WAY = 10
"""Steps of niceness: a tenth of an equal's share where processors are short, all where not."""

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do work in a thread, as `asyncio.to_thread` does, but to its end.

    A caller who is cancelled goes on only after it, so that nothing that he cleans up is still
    being written.

    Raises:
        ResourceExhaustedError: no thread can be started now.
    """
    future = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):  # he may be cancelled again
                await asyncio.wait([future])
        if not future.cancelled() and (error := future.exception()):
            log.warning("not finished before it was cancelled: %s", error)
        raise
    except RuntimeError as error:
        if "start new thread" in str(error):
            raise ResourceExhaustedError("no thread can be started", rule="processes") from error
        raise


def give_way() -> None:
    """Let all other threads go before the calling one; for those that move and check bytes.

    The event loop answers heartbeats and commands: it must not wait until every byte is through.
    """
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(GIVE_WAY)
