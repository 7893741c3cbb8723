"""A process with everything that it starts, and the end of them all."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from flplatform.core.errors import ResourceExhaustedError
from flplatform.files.shortage import explaining_shortage
from flplatform.files.threads import in_thread

log = logging.getLogger(__name__)

MARK = "FLP_RUN_ID"
"""Environment variable that all processes of a tree inherit, wherever they hang by now."""
CHUNK_BYTES = 1 << 16
PAUSE_S = 0.002
"""After a full chunk of output, so that a flood of it leaves time for all else."""
DRAIN_S = 2.0
_ROUNDS = 200
_ROUND_S = 0.01
_LOOKS = 2
EXECUTING = ""
"""Mark of a process between two programs: the kernel shows neither its words nor its variables."""
AGAIN_S = 0.1, 1.0
"""From which pause to which what could not be looked for is looked for again."""
LAUNCHER_S = 1.0
"""For a launcher to end all that it has started; then it is killed."""
TRUST_S = 2.0
"""After this it is believed that a launcher that has ended by itself has left nothing."""


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
            ResourceExhaustedError: no thread can be started that waits for its end. It may run:
                see `end`.
        """
        # A pipe of our own: asyncio would not report the end of the process while a grandchild
        # still holds its output open.
        read_end, write_end = os.pipe()
        output = asyncio.StreamReader()
        with os.fdopen(write_end, "wb", 0):
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
            except BaseException as error:
                transport.close()
                if isinstance(error, RuntimeError) and "start new thread" in str(error):
                    raise ResourceExhaustedError(
                        "no thread can be started", rule="processes"
                    ) from error
                raise
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

        Whatever this machine is short of: see `end`.

        Returns:
            Its exit status; negative or above 128 for a signal.
        """
        status = await self._process.wait()
        await end(self._mark, patience_s=TRUST_S if status >= 0 else math.inf)
        await asyncio.wait({self._pump}, timeout=DRAIN_S)
        self._pump.cancel()
        await asyncio.wait({self._pump})
        return status

    async def kill(self) -> None:
        """Send SIGKILL to all of them until none is left, whatever this machine is short of."""
        await end(self._mark, self._root, unseen=self._end_unseen)

    def _root(self) -> int | None:
        return self.pid if self._process.returncode is None else None  # it may be another's then

    def _end_unseen(self, since_s: float) -> None:
        """End what can be ended without looking for it, `since_s` seconds after the first time."""
        with contextlib.suppress(OSError):
            if since_s >= LAUNCHER_S and self._root():
                os.killpg(self.pid, signal.SIGKILL)
            else:  # a launcher finds and kills what it has started, with descriptors of its own
                self.terminate()


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


async def end(
    mark: str,
    root: Callable[[], int | None] = lambda: None,
    *,
    unseen: Callable[[float], None] = lambda _: None,
    patience_s: float = math.inf,
) -> None:
    """Do as `kill` does, again until this machine has the descriptors and the thread for it.

    Args:
        mark: as for `find`.
        root: says it for `find` each time.
        unseen: called each time that nothing could be looked for, with the seconds since the
            first time.
        patience_s: for how long this is tried.
    """
    began, pause_s = time.monotonic(), AGAIN_S[0]
    while True:
        try:
            return await in_thread(kill, mark, root())
        except (ResourceExhaustedError, OSError) as error:
            since_s = time.monotonic() - began
            if pause_s == AGAIN_S[0]:
                log.warning("%s: what is to end cannot be looked for: %s", mark, error)
            if since_s >= patience_s:
                return None
        unseen(since_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, AGAIN_S[1])


def ask_to_end(process: psutil.Process) -> None:
    """Send SIGTERM to a process that is known to be there, if it may be."""
    with contextlib.suppress(psutil.Error, OSError):
        try:
            process.terminate()
        except OSError:  # no descriptor is left to see whether this number still is its own
            os.kill(process.pid, signal.SIGTERM)


def find(mark: str, root: int | None = None) -> list[psutil.Process]:
    """Return the live processes below `root`, itself first, and all that carry `mark`.

    Raises:
        ResourceExhaustedError: this machine is short of what it takes to look.
        OSError: the processes cannot be listed.
    """
    return _look(mark, root)[0]


def _look(mark: str, root: int | None) -> tuple[list[psutil.Process], bool]:
    """Return what `find` does, and whether there are processes that cannot be told yet."""
    nameless = False
    with explaining_shortage():
        found = _tree(root) if root is not None else []
        for process in psutil.process_iter():
            if process in found:
                continue
            if (its := _mark_of(process)) == mark:
                found.append(process)
            nameless = nameless or its == EXECUTING
        return [process for process in found if _alive(process)], nameless


def kill(mark: str, root: int | None = None) -> None:
    """Kill what `find` finds until it finds nothing; blocks, for a few seconds at most.

    SIGKILL all along, parents first: who is killed starts nothing more and misses no child, and
    who was missed is found next time. So it is looked twice, as a process may end while it is
    looked for and leave another, and more often while one is just becoming another program: it has
    neither a mark nor words in that moment.

    Raises:
        ResourceExhaustedError: this machine is short of what it takes to look for them.
        OSError: the processes cannot be listed.
    """
    looked = 0
    for _ in range(_ROUNDS):
        found, nameless = _look(mark, root)
        looked = 0 if found or nameless else looked + 1
        if looked == _LOOKS:
            return
        for process in found:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        time.sleep(_ROUND_S)


def _tree(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _mark_of(process: psutil.Process) -> str | None:
    try:
        with explaining_shortage():
            environment = process.environ()
            if not environment and not process.cmdline() and process.exe():
                return EXECUTING
            return environment.get(MARK)
    except (psutil.Error, OSError):
        return None  # it has ended, or is another user's


def _alive(process: psutil.Process) -> bool:
    try:
        with explaining_shortage():
            return process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False
