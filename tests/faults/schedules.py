"""Random faults to processes, replayable by their seed."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable

import psutil

from tests.faults.federations import Faulty

CRASHES = 2
"""Kills of run processes per site in one schedule: three of one task would fail it for good."""

STARTING_S = 0.4
"""How far a process has come, at most, when it is killed as it starts."""

STOPPED_S = (0.1, 1.5)
PAUSE_S = (0.05, 1.0)


class Schedule:
    """Draws and carries out faults; afterwards everything runs again.

    Args:
        federation: whose processes suffer.
        seed: decides everything but how fast they are.
    """

    def __init__(self, federation: Faulty, seed: int) -> None:
        self._federation = federation
        self._random = random.Random(seed)
        self._crashes = dict.fromkeys(federation.sites, 0)
        self.story: list[str] = []

    def play(self, count: int, over: Callable[[], bool] = lambda: False) -> None:
        """Inject `count` faults, or fewer if it is `over` before."""
        for _ in range(count):
            if over():
                return
            time.sleep(self._random.uniform(*PAUSE_S))
            self.one()

    def one(self) -> None:
        """Inject one fault, and start again what it has ended."""
        names = ["server", *self._federation.sites]
        kind = self._random.choice(
            ["kill", "kill", "kill", "terminate", "stop", "crash", "many", "starting"]
        )
        victims = [self._random.choice(names)]
        if kind == "many":
            victims = self._random.sample(names, self._random.randint(2, len(names)))
        self.story.append(f"{kind} {' '.join(victims)}")
        self._federation.tally.fault(f"schedule: {kind}")
        match kind:
            case "kill" | "many":
                self._kill(victims)
                self._start(victims)
            case "terminate":
                code = self._federation.terminate(victims[0])
                assert code == 0, f"{victims[0]} ended with {code} when it was asked to"
                self._start(victims)
            case "starting":
                self._kill(victims)
                self._federation._spawn(victims[0])
                time.sleep(self._random.uniform(0, STARTING_S))
                self._federation.kill_hard(victims[0])
                self._start(victims)
            case "stop":
                self._federation.signal(victims[0], signal.SIGSTOP)
                time.sleep(self._random.uniform(*STOPPED_S))
                self._federation.signal(victims[0], signal.SIGCONT)
            case "crash":
                self._crash(self._random.choice(self._federation.sites))

    def _kill(self, names: list[str]) -> None:
        for name in names:
            self._federation.signal(name, signal.SIGKILL)
        for name in names:
            self._federation.kill_hard(name)

    def _start(self, names: list[str]) -> None:
        try:
            self._federation.start(*names)
        except (TimeoutError, subprocess.SubprocessError) as error:
            raise AssertionError(f"not up again after {self.story}: {error}") from error
        self._federation.tally.recovered()

    def _crash(self, site: str) -> None:
        if self._crashes[site] >= CRASHES:
            return
        for process in self._federation.run_processes(site)[:1]:
            self._crashes[site] += 1
            with contextlib.suppress(psutil.Error):
                process.kill()

    def forgive(self) -> None:
        """Let run processes crash again: another run is at work."""
        self._crashes = dict.fromkeys(self._crashes, 0)
