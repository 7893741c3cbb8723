"""Loops that end by themselves end the process."""

import asyncio
import logging

import pytest

from flplatform.files.loops import supervise


@pytest.mark.parametrize("broken", [True, False])
def test_a_loop_that_ends_restarts_the_process(
    broken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def loop() -> None:
        if broken:
            raise OSError("the disk is full")

    async def main() -> None:
        over = asyncio.Event()
        restarts: list[bool] = []

        def end(restart: bool) -> None:
            restarts.append(restart)
            over.set()

        (task,) = supervise({"tasks": loop()}, end)
        async with asyncio.timeout(60):
            await over.wait()
        assert restarts == [True]
        assert task.done()

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(main())
    assert "loop 'tasks' has ended" in caplog.text
    assert ("the disk is full" in caplog.text) is broken


def test_a_cancelled_loop_is_no_trouble() -> None:
    async def main() -> None:
        ended: list[bool] = []
        (task,) = supervise({"tasks": asyncio.Event().wait()}, ended.append)  # type: ignore[dict-item]
        task.cancel()
        await asyncio.wait([task])
        assert ended == []

    asyncio.run(main())
