"""Several processes that work on each task together, at one site: torchrun and its ranks.

torchrun starts them and lets them find each other on loopback; orders and answers go between the
parent and each of them. Every rank gets the same orders, and only what rank 0 returns counts.
"""

import os
import subprocess
from collections.abc import Sequence

from flplatform.client.frames import MAX_ERROR_CHARS, MAX_TRACEBACK_BYTES
from flplatform.client.replies import Done, Failure, Result
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError

LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_S = 60.0
MAX_SHOWN = 3
"""Of the ranks' different errors."""
_PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"


def torchrun(python: str, processes: int, argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` so many times, as ranks of one group.

    Args:
        python: an interpreter that has torch.
        processes: how many.
        argv: what each of them runs.
    """
    # The rendezvous is on loopback, at a free port: all that there is within the sandbox.
    options = ["--standalone", "--local-addr", LOOPBACK, "--nproc-per-node", str(processes)]
    return [python, "-P", "-m", "torch.distributed.run", *options, "--no-python", *argv]


def variables(processes: int) -> dict[str, str]:
    """Return the environment variables that processes of one group need beside the usual."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def demand_torch(python: str, environment: str) -> None:
    """Refuse to start torchrun where there is none; blocks for the start of an interpreter.

    Raises:
        FailedPreconditionError: names the environment and what is missing.
        OSError: there is no such interpreter.
    """
    argv = [python, "-I", "-c", _PROBE]
    try:
        found = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FailedPreconditionError(
            f"{python} of environment {environment} does not start within {PROBE_TIMEOUT_S:g} s"
        ) from None
    if found.returncode != 0:
        raise FailedPreconditionError(
            f"several processes need torch in environment {environment}: {python} has none",
            hint=f"{python} -m pip install torch",
        )


class Answers:
    """What the ranks say about one task, and what it comes to.

    Args:
        task: id of the task.
        processes: how many ranks there are.
    """

    def __init__(self, task: str, processes: int) -> None:
        self.task = task
        self._processes = processes
        self._said: dict[int, Result | Done | Failure] = {}

    def add(self, rank: int, said: Result | Done | Failure) -> None:
        """Take in a rank's answer.

        Raises:
            InvalidArgumentError: it is about something else, or the rank has answered before.
        """
        expected = Done if rank else Result
        if said.task != self.task or rank in self._said:
            raise InvalidArgumentError(f"answered {said.task!r:.100}, not {self.task!r}")
        if not isinstance(said, expected | Failure):
            raise InvalidArgumentError(f"rank {rank} sent a {said.type}")
        self._said[rank] = said

    @property
    def failed(self) -> bool:
        """Whether a rank has failed: others may now wait for it for ever."""
        return any(isinstance(said, Failure) for said in self._said.values())

    @property
    def complete(self) -> bool:
        """Whether every rank has answered."""
        return len(self._said) == self._processes

    def reply(self) -> Result | Failure | None:
        """Return rank 0's result, or how ranks have failed; None if neither is there yet."""
        failures = {rank: s for rank, s in self._said.items() if isinstance(s, Failure)}
        if failures:
            return failure_of(self.task, failures) if self._processes > 1 else failures[0]
        result = self._said.get(0)
        return result if self.complete and isinstance(result, Result) else None


def failure_of(task: str | None, failures: dict[int, Failure]) -> Failure:
    """Return one failure that names the ranks, in the order in which they failed.

    The first may only be how another's failure looks from the outside, so the first few are shown
    that differ, each with the same share of what one failure may hold.
    """
    distinct: dict[str, tuple[int, Failure]] = {}
    for rank, failure in failures.items():
        distinct.setdefault(failure.error, (rank, failure))
    shown = list(distinct.values())[:MAX_SHOWN]
    chars = MAX_ERROR_CHARS // len(shown) - len("; ")
    share = MAX_TRACEBACK_BYTES // len(shown) - len("rank 1000:\n\n")
    return Failure(
        type="failure",
        task=task,
        error="; ".join(f"rank {rank}: {failure.error}"[:chars] for rank, failure in shown),
        traceback="\n".join(
            f"rank {rank}:\n{_end(failure.traceback, share)}"
            for rank, failure in shown
            if failure.traceback
        ),
    )


def _end(text: str, max_bytes: int) -> str:
    return text.encode(errors="replace")[-max_bytes:].decode(errors="ignore")
