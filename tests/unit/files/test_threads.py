"""Work in a thread that outlives nobody's clean-up."""

import asyncio
import logging
import threading

import pytest

from flplatform.files.threads import in_thread


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
        assert go.wait(10)
        raise OSError("half done")

    async def scene() -> None:
        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.WARNING):
        asyncio.run(scene())
    assert "half done" in caplog.text
