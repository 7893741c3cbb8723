"""Process trees: their end, and what they print."""

import asyncio
import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flplatform.client import process_tree
from flplatform.client.process_tree import MARK, ProcessTree, ask_to_end, find, kill
from flplatform.client.sandbox import NONE, Mounts, command
from flplatform.core.errors import ResourceExhaustedError


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
        assert await asyncio.wait_for(tree.wait(), 60) == 0
        assert output == [b"there\n"]

    asyncio.run(run())
    assert find("tree") == []


@pytest.mark.parametrize("looks", [1, 5])
def test_a_stray_that_is_just_becoming_another_program_is_killed(monkeypatch, looks):
    """The kernel shows none of its variables until it is; once is enough for who was missed."""
    stray = subprocess.Popen(["sleep", "1000"], env={**os.environ, MARK: "becoming"})
    seen = process_tree._mark_of
    left = [looks]

    def mark_of(process):
        if process.pid == stray.pid and left[0]:
            left[0] -= 1
            return process_tree.EXECUTING if looks > 1 else None
        return seen(process)

    try:
        while not find("becoming"):
            time.sleep(0.01)
        monkeypatch.setattr(process_tree, "_mark_of", mark_of)
        kill("becoming")
        assert stray.wait(60) == -signal.SIGKILL
        assert left == [0]
    finally:
        stray.kill()
        stray.wait()


def test_kill_reaches_descendants_without_the_mark():
    async def run():
        tree = await start("env -i sh -c 'sleep 1000; true' & wait", [], "other")
        while len(find("none of these", tree.pid)) < 3:
            await asyncio.sleep(0.02)
        descendants = find("none of these", tree.pid)
        await tree.kill()
        assert await tree.wait() == -9
        await tree.kill()
        assert gone(descendants)

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
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    kill("zombie", process.pid)
    assert find("zombie", process.pid) == []
    process.wait()
    assert find("zombie", process.pid) == []


@contextlib.contextmanager
def no_descriptor():
    """Take all descriptors there are; what is yielded gives them back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []

    def release():
        while held:
            os.close(held.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    handle = os.open("/dev/null", os.O_RDONLY)
    os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handle + 50, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield release
    finally:
        release()


@contextlib.contextmanager
def no_thread(monkeypatch):
    def refused(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        yield patch.undo


def launched(script: str, mark: str):
    """Start a shell as run processes are started at the level `none`."""
    python = [sys.executable, "-I", "-S", "-c", f"import os; os.system({script!r})"]
    return ProcessTree.start(
        command(NONE, Mounts(Path("/")), python),
        environment={"PATH": os.environ["PATH"]},
        folder=Path("/"),
        mark=mark,
        on_output=lambda _: None,
    )


async def until(condition, patience_s: float = 60.0):
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.02)


def gone(processes) -> bool:
    return not any(process_tree._alive(process) for process in processes)


@contextlib.contextmanager
def ends(processes):
    """What is yielded says whether all have ended, and takes no descriptor for it."""
    handles = [os.pidfd_open(process.pid) for process in processes]
    try:
        yield lambda: len(select.select(handles, [], [], 0)[0]) == len(handles)
    finally:
        for handle in handles:
            os.close(handle)


def test_what_cannot_be_looked_for_is_not_taken_for_nothing():
    with (
        subprocess.Popen(["sleep", "1000"], env={MARK: "unseen"}) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        while not find("unseen"):
            time.sleep(0.01)
        with no_descriptor():
            for look in (find, kill):
                with pytest.raises(ResourceExhaustedError, match="descriptor"):
                    look("unseen")
                with pytest.raises(ResourceExhaustedError, match="descriptor"):
                    look("nothing", process.pid)
        assert process.poll() is None


def test_a_foreign_process_that_cannot_be_read_is_passed_over(monkeypatch):
    def unreadable(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(psutil.Process, "environ", unreadable)
    assert find("nothing") == []


def test_kill_without_descriptors_ends_all_and_looks_again_when_there_are_some():
    """The launcher finds what has left its session; nobody has to wait for descriptors."""

    async def run():
        tree = await launched("setsid sleep 1000 & sleep 1000", "short")
        await until(lambda: len(find("short")) >= 4)
        found = find("short")
        with no_descriptor() as release:
            killing = asyncio.create_task(tree.kill())
            await until(lambda: tree._process.returncode is not None)
            release()
            await asyncio.wait_for(killing, 60)
            assert gone(found)
        assert await asyncio.wait_for(tree.wait(), 60) == 128 + signal.SIGTERM

    asyncio.run(run())


def test_a_launcher_that_does_not_end_by_itself_is_killed(monkeypatch):
    monkeypatch.setattr(process_tree, "LAUNCHER_S", 0.2)

    async def run():
        tree = await launched("setsid sleep 1000 & sleep 1000", "stopped")
        await until(lambda: len(find("stopped")) >= 4)
        found = find("stopped")
        os.kill(tree.pid, signal.SIGSTOP)
        with no_descriptor() as release:
            killing = asyncio.create_task(tree.kill())
            await until(lambda: tree._process.returncode is not None)
            waiting = asyncio.create_task(tree.wait())
            done, _ = await asyncio.wait({killing, waiting}, timeout=0.3)
            assert done == set()  # a stray may be left: nobody could look
            release()
            await asyncio.wait_for(killing, 60)
            assert await asyncio.wait_for(waiting, 60) == -signal.SIGKILL
        assert gone(found)

    asyncio.run(run())


def test_a_launcher_that_has_ended_by_itself_is_believed_after_a_while(monkeypatch):
    monkeypatch.setattr(process_tree, "TRUST_S", 0.2)
    looked = []

    def none_left(*_):
        looked.append(time.monotonic())
        raise ResourceExhaustedError("no file descriptor is left")

    async def run():
        tree = await launched("true", "believed")
        with monkeypatch.context() as patch:
            patch.setattr(process_tree, "kill", none_left)
            assert await asyncio.wait_for(tree.wait(), 60) == 0
        assert looked[-1] - looked[0] >= 0.2

    asyncio.run(run())


def test_kill_without_threads(monkeypatch):
    async def run():
        tree = await launched("setsid sleep 1000 & sleep 1000", "threads")
        await until(lambda: len(find("threads")) >= 4)
        found = find("threads")
        with no_thread(monkeypatch) as release:
            killing = asyncio.create_task(tree.kill())
            await until(lambda: gone(found))
            release()
        await asyncio.wait_for(killing, 60)
        await asyncio.wait_for(tree.wait(), 60)

    asyncio.run(run())


def test_what_nobody_can_wait_for_is_ended(monkeypatch):
    """The process runs already when the thread that waits for its end cannot be started."""

    async def run():
        with no_thread(monkeypatch), pytest.raises(ResourceExhaustedError, match="thread"):
            await launched("sleep 1000", "unwatched")
        await process_tree.end("unwatched")
        assert find("unwatched") == []

    asyncio.run(run())


def test_asking_takes_no_descriptor():
    with subprocess.Popen(["sleep", "1000"]) as process:
        known = psutil.Process(process.pid)
        with no_descriptor():
            ask_to_end(known)
        assert process.wait(60) == -signal.SIGTERM
    ask_to_end(known)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_start_that_is_cancelled_leaves_no_descriptor():
    """Wherever it waits: the first time for its end of the pipe."""

    async def run():
        await (await start("true", [])).wait()  # what the loop keeps is open now
        before = descriptors()
        starting = asyncio.create_task(start("exec sleep 1000", [], "cancelled"))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled()
        await asyncio.sleep(0)  # a transport closes its pipe in the next turn
        assert descriptors() == before

    asyncio.run(run())
