"""Process trees: their end, and what they print."""

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from flplatform.client.process_tree import MARK, ProcessTree, find, kill


def start(script: str, output: list[bytes], mark: str = "tree"):
    return ProcessTree.start(
        ["/bin/sh", "-c", script],
        environment={"PATH": os.environ["PATH"]},
        folder=Path("/"),
        mark=mark,
        on_output=output.append,
    )


def test_output_and_status():
    async def run():
        output = []
        tree = await start(f"pwd; echo problem >&2; cat; echo ${MARK}; exit 5", output)
        assert await tree.wait() == 5
        assert b"".join(output) == b"/\nproblem\ntree\n"

    asyncio.run(run())


def test_strays_are_killed_when_the_first_process_ends():
    async def run():
        output = []
        tree = await start("setsid sleep 1000 & echo there", output)
        assert await asyncio.wait_for(tree.wait(), 5) == 0
        assert output == [b"there\n"]

    asyncio.run(run())
    assert find("tree") == []


def test_kill_reaches_descendants_without_the_mark():
    async def run():
        tree = await start("env -i sh -c 'sleep 1000; true' & wait", [], "other")
        while len(find("none of these", tree.pid)) < 3:
            await asyncio.sleep(0.02)
        descendants = find("none of these", tree.pid)
        await tree.kill()
        assert await tree.wait() == -9
        await tree.kill()
        assert not any(item.is_running() and item.status() != "zombie" for item in descendants)

    asyncio.run(run())


def test_terminate():
    async def run():
        tree = await start("exec sleep 1000", [])
        tree.terminate()
        assert await tree.wait() == -15
        with pytest.raises(ProcessLookupError):
            tree.terminate()

    asyncio.run(run())


def test_a_flood_leaves_the_loop_its_time():
    async def run():
        count = [0]

        async def tick():
            while True:
                await asyncio.sleep(0)
                count[0] += 1

        tree = await ProcessTree.start(
            ["/bin/sh", "-c", "head -c 10000000 /dev/zero"],
            environment={"PATH": os.environ["PATH"]},
            folder=Path("/"),
            mark="flood",
            on_output=lambda _: None,
        )
        ticking = asyncio.create_task(tick())
        await tree.wait()
        ticking.cancel()
        assert count[0] > 1000

    asyncio.run(run())


def test_a_program_that_is_not_there():
    async def run():
        with pytest.raises(FileNotFoundError):
            await ProcessTree.start(
                ["/nowhere"], environment={}, folder=Path("/"), mark="m", on_output=print
            )

    asyncio.run(run())


def test_zombies_do_not_count():
    process = subprocess.Popen(["/bin/true"], env={MARK: "zombie"})
    time.sleep(0.1)
    kill("zombie", process.pid)
    assert find("zombie", process.pid) == []
    process.wait()
    assert find("zombie", process.pid) == []
