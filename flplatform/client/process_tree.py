"""A process with everything that it starts, and the end of them all."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "FLP_RUN_ID"
"""Environment variable that all processes of a tree inherit, wherever they hang by now."""
CHUNK_BYTES = 1 << 16
PAUSE_S = 0.002
"""After a full chunk of output, so that a flood of it leaves time for all else."""
DRAIN_S = 2.0
_ROUNDS = 200
_ROUND_S = 0.01


class ProcessTree:
    """One started process, its descendants and strays, and what they print.

    Made by `start`. Not thread-safe: it belongs to the event loop that started it.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, mark: str, pump: "asyncio.Task[None]"
    ) -> None:
        self._process = process
        self._mark = mark
        self._pump = pump

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        mark: str,
        on_output: Callable[[bytes], None],
    ) -> "ProcessTree":
        """Start `argv` in a session of its own, reading nothing.

        Args:
            argv: program and arguments.
            environment: all of its environment, but for the mark.
            folder: its working folder.
            mark: names the tree, on this host and for this user.
            on_output: takes what the processes write to standard output and error.

        Raises:
            OSError: the program cannot be started.
        """
        # A pipe of our own: asyncio would not report the end of the process while a grandchild
        # still holds its output open.
        read_end, write_end = os.pipe()
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb", 0)
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env={**environment, MARK: mark},
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            transport.close()
            raise
        finally:
            os.close(write_end)
        return cls(process, mark, asyncio.create_task(_pump(output, transport, on_output)))

    @property
    def pid(self) -> int:
        """Process id of the first process."""
        return self._process.pid

    def terminate(self) -> None:
        """Send SIGTERM to the first process.

        Raises:
            ProcessLookupError: it has ended.
        """
        self._process.terminate()

    async def wait(self) -> int:
        """Wait for the first process, kill what it left, read what they printed.

        Returns:
            Its exit status; negative or above 128 for a signal.
        """
        status = await self._process.wait()
        await asyncio.to_thread(kill, self._mark)
        await asyncio.wait({self._pump}, timeout=DRAIN_S)
        self._pump.cancel()
        await asyncio.wait({self._pump})
        return status

    async def kill(self) -> None:
        """Send SIGKILL to all of them until none is left."""
        await asyncio.to_thread(kill, self._mark, self.pid)


async def _pump(
    output: asyncio.StreamReader,
    transport: asyncio.ReadTransport,
    on_output: Callable[[bytes], None],
) -> None:
    try:
        while data := await output.read(CHUNK_BYTES):
            on_output(data)
            if len(data) == CHUNK_BYTES:
                await asyncio.sleep(PAUSE_S)
    finally:
        transport.close()


def find(mark: str, root: int | None = None) -> list[psutil.Process]:
    """Return the live processes below `root`, itself first, and all that carry `mark`."""
    found = _tree(root) if root is not None else []
    for process in psutil.process_iter():
        try:
            if process not in found and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is another user's
    return [process for process in found if _alive(process)]


def kill(mark: str, root: int | None = None) -> None:
    """Kill what `find` finds until it finds nothing; blocks, for a few seconds at most.

    SIGKILL all along, parents first: who is killed starts nothing more and misses no child, and
    who was missed is found next time.
    """
    for _ in range(_ROUNDS):
        found = find(mark, root)
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_ROUND_S)


def _tree(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
