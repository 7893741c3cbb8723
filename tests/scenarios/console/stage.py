"""The federation behind the transcripts: real processes, in one state after the other."""

import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from flplatform.core import events as ev
from tests.scenarios.conftest import ADMIN, Running
from tests.scenarios.console.terminal import Terminal
from tests.scenarios.console.transcript import Step, Transcript

GOOD = ("clinic-a", "clinic-b")
DEAD, STRICT, SLOW = "dead", "strict", "slow"
SITES = (*GOOD, DEAD, STRICT, SLOW)

STAGES = ("idle", "training", "finished", "again", "ending")
"""In this order:

    idle       no run yet
    training   run 1 of both clinics is in round 1 of 2; clinic-a's update is in, clinic-b trains
    finished   run 1 has finished
    again      for transcripts that submit runs of their own
    ending     for transcripts that end processes or registrations
"""
MOST_LINES = 10_000
"""Of what the server says, more than it does."""

SILENT = re.compile(r"\s*(\S+)\s+no reply after ")
TRIES = 3
"""Of a command, where this machine stood still for so long that a site that runs was silent."""

LAST = ("revoke", "remove_client", "restart", "shutdown")
"""Transcripts that leave less than they found, in this order."""

STRICT_POLICY = """
allow_foreign_code_unsandboxed: true
submitters: none
commands: {"*": none}
"""


class Stage:
    """A context manager that has the federation and a console, and ends both."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fls-"))
        # A site that is stopped while it is asked stays silent for 2 s: no reason to give it up.
        self.federation = Running(self._folder, SITES, heartbeat_s=0.5, dead_after_s=10.0)
        self.terminal = Terminal(
            self.federation.kit(ADMIN), self.federation.passphrase_file().read_text().strip()
        )
        self._at = ""
        self._stopped: set[str] = set()
        self._held: dict[tuple[str, int], Callable[[], None]] = {}
        for site in SITES:
            text = STRICT_POLICY if site == STRICT else "allow_foreign_code_unsandboxed: true\n"
            self.federation.local(site, "policy.yml", text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.terminal.close()
        self.act(f"continue {SLOW}")
        self.federation.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def play(self, step: Step) -> list[str]:
        """Carry out a step; return what the console shows, or what did not come in time."""
        try:
            if step.kind == ">":
                for _ in range(TRIES):
                    shown = self.terminal.run(step.text, step.answers)
                    if not self._stood_still(shown):
                        break
                return shown
            self.act(step.text)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            self.terminal.close()
            return str(error).splitlines()
        return []

    def _stood_still(self, shown: list[str]) -> bool:
        silent = {found[1] for line in shown if (found := SILENT.match(line))}
        return bool((silent & self.federation.processes.keys()) - self._stopped)

    def reach(self, stage: str) -> None:
        """Bring the federation into the state of a stage; there is no way back."""
        for name in STAGES[STAGES.index(self._at) + 1 if self._at else 0 : STAGES.index(stage) + 1]:
            self._at = name
            if name in ("idle", "training", "finished"):
                getattr(self, f"_{name}")()

    def _idle(self) -> None:
        federation = self.federation
        federation.start("server", DEAD)
        federation.wait_for(lambda: self._server_said(f"{DEAD} registered"), f"{DEAD} to come")
        federation.kill(DEAD)
        federation.start(*(site for site in SITES if site != DEAD))
        federation.wait_for(lambda: self._server_said(f"{DEAD} is dead"), f"{DEAD} to be given up")

    def _server_said(self, what: str) -> bool:
        return what in self.federation.output("server", MOST_LINES)

    def _training(self) -> None:
        federation = self.federation
        federation.steps_job(min_clients=len(GOOD))
        first, second = GOOD
        self.act(f"hold {first} 1")
        self.act(f"hold {second} 1")
        answer = federation.ask(f"submit_job steps --sites {','.join(GOOD)}")
        assert answer["ok"], answer
        began = f"{second} began: train"  # told before the other's update, whoever is faster
        federation.wait_for(lambda: began in str(federation.ask("why 1")), began)
        self.act(f"release {first} 1")
        federation.wait_event(1, ev.UpdateAccepted, site=first)

    def _finished(self) -> None:
        self.act(f"release {GOOD[1]} 1")
        self.federation.wait_event(1, ev.RunEnded)

    def _start(self, name: str) -> None:
        """Start a process, and wait until the sites that it concerns are registered."""
        said = len(self.federation.output("server", MOST_LINES))
        self.federation.start(name)
        running = (*SITES, "server")
        for site in [each for each in running if each in self.federation.processes]:
            if site != "server" and name in (site, "server"):
                self.federation.wait_for(
                    lambda site=site: (
                        f"{site} registered" in self.federation.output("server", MOST_LINES)[said:]
                    ),
                    f"{site} to register",
                )

    def act(self, what: str) -> None:
        """Let something happen: `stop|continue|start|ended SITE`, `hold|release SITE ROUND`.

        `ended` waits until a process has ended by itself.
        """
        verb, name, *more = what.split()
        federation, process = self.federation, self.federation.processes.get(name)
        match verb:
            case "stop" | "continue":
                if process is not None:
                    process.send_signal(signal.SIGSTOP if verb == "stop" else signal.SIGCONT)
                    (self._stopped.add if verb == "stop" else self._stopped.discard)(name)
            case "start":
                self._start(name)
            case "ended":
                federation.processes.pop(name).wait(timeout=60)
            case "hold":
                self._held[name, int(more[0])] = federation.hold(name, int(more[0]))
            case "release":
                self._held.pop((name, int(more[0])))()
            case _:
                raise ValueError(f"nothing is called {verb!r}")


def in_order(transcripts: list[Transcript]) -> list[Transcript]:
    """Return transcripts in the order in which one federation can play them."""

    def place(transcript: Transcript) -> tuple[int, int, str]:
        name = transcript.name
        last = LAST.index(name) + 1 if name in LAST else 0
        return STAGES.index(transcript.stage), last, name

    return sorted(transcripts, key=place)
