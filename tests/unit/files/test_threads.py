"""Work in a thread that outlives nobody's clean-up."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable

import pytest

from flplatform.core.errors import ResourceExhaustedError
from flplatform.files.threads import GIVE_WAY, Workers, give_way, in_thread


def test_it_returns_and_raises_as_the_work_does() -> None:
    assert asyncio.run(in_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_thread(divmod, 7, 0))


def test_whoever_is_cancelled_goes_on_only_after_the_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(60)
        raise OSError("half done")

    async def scene() -> None:
        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "half done" in caplog.text


def test_a_second_cancel_does_not_get_ahead_of_the_work_either() -> None:
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(60)

    async def scene() -> None:
        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(3):
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=0.02)
            assert not done
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())


def test_no_thread_left_is_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scene() -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(ResourceExhaustedError) as caught:
            await in_thread(int)
        assert caught.value.rule == "processes"
        monkeypatch.undo()

    asyncio.run(scene())
    with pytest.raises(RuntimeError, match="another"):
        asyncio.run(in_thread(_fail))


def _fail() -> None:
    raise RuntimeError("another")


def _no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_work_that_was_refused_is_not_done_by_whoever_comes_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is tried again by then: what must not be done twice would be, at the same time."""
    done: list[str] = []

    async def scene() -> None:
        with monkeypatch.context() as patch:
            _no_more_threads(patch)
            with pytest.raises(ResourceExhaustedError):
                await in_thread(done.append, "refused")
        await in_thread(done.append, "accepted")
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(scene())
    assert done == ["accepted"]


def test_work_that_was_begun_though_no_thread_could_be_started_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that became free in between has taken it."""
    begun, go = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert go.wait(60)
        return 7

    async def scene() -> None:
        real = asyncio.to_thread

        async def to_thread(once: Callable[[], None]) -> None:
            threading.Thread(target=once).start()
            assert begun.wait(60)
            asyncio.get_running_loop().call_soon(go.set)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(asyncio, "to_thread", to_thread)
        assert await in_thread(work) == 7
        monkeypatch.setattr(asyncio, "to_thread", real)

    asyncio.run(scene())


def test_a_pool_refuses_work_only_if_it_has_no_thread_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def wait() -> bool:
        begun.set()
        return go.wait(60)

    with Workers(2) as pool:
        with monkeypatch.context() as patch:
            _no_more_threads(patch)
            with pytest.raises(ResourceExhaustedError, match="no thread can be started"):
                pool.submit(done.append, "refused")
        first = pool.submit(wait)
        assert begun.wait(60)
        with monkeypatch.context() as patch:
            _no_more_threads(patch)
            second = pool.submit(done.append, "later")
            go.set()
            second.result(10)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 7, 0).result(10)
    assert first.result()
    assert done == ["later"]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)


@pytest.mark.may_skip
@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_a_thread_that_gives_way_is_alone_in_that() -> None:
    def look() -> int:
        give_way()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert asyncio.run(in_thread(look)) == min(19, before + GIVE_WAY)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
