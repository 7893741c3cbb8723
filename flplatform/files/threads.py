"""Work in threads that nobody may get ahead of."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from flplatform.core.errors import ResourceExhaustedError

log = logging.getLogger(__name__)

GIVE_WAY = 10
"""Steps of niceness: a tenth of an equal's share where processors are short, all where not."""

P = ParamSpec("P")
T = TypeVar("T")


class _Once(Generic[T]):
    """Work that is begun once, or given up before.

    An executor that can start no thread says so and keeps the work in its queue: whichever thread
    comes by does it, also after it was tried again.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.future: Future[T] = Future()

    def __call__(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            self.future.set_exception(error)


class Workers(ThreadPoolExecutor):
    """A pool in which work is begun once or refused; with any thread at all it is begun."""

    _alive = False

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """See `Executor.submit`.

        Raises:
            ResourceExhaustedError: no thread can be started, and none was before.
        """
        once = _Once(partial(self._do, partial(work, *args, **kwargs)))
        try:
            super().submit(once)
        except RuntimeError as error:
            if not _no_thread(error):
                raise
            if not self._alive and once.future.cancel():
                raise _shortage() from error
        return once.future

    def _do(self, work: Callable[[], T]) -> T:
        self._alive = True  # a thread of this pool: they never end
        return work()


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do work in a thread, as `asyncio.to_thread` does, but to its end.

    A caller who is cancelled goes on only after it, so that nothing that he cleans up is still
    being written.

    Raises:
        ResourceExhaustedError: no thread can be started now.
    """
    future = asyncio.ensure_future(_through(_Once(partial(work, *args, **kwargs))))
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
        if _no_thread(error):
            raise _shortage() from error
        raise


async def _through(once: _Once[T]) -> T:
    try:
        await asyncio.to_thread(once)
    except RuntimeError as error:
        if not _no_thread(error) or once.future.cancel():
            raise
        await asyncio.wait([asyncio.wrap_future(once.future)])  # another thread is doing it
    return once.future.result()


def _no_thread(error: RuntimeError) -> bool:
    return "start new thread" in str(error)


def _shortage() -> ResourceExhaustedError:
    return ResourceExhaustedError("no thread can be started", rule="processes")


def give_way() -> None:
    """Let all other threads go before the calling one; for those that move and check bytes.

    The event loop answers heartbeats and commands: it must not wait until every byte is through.
    """
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(GIVE_WAY)
