"""A federation of real processes in whose way faults are put, and what must hold afterwards."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from flplatform.core import events as ev
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.verify import verify_state
from tests.faults.crashing import KINDS
from tests.faults.tally import Tally
from tests.scenarios.conftest import ROOT, Running
from workspaces.running import ADMIN

DURABLE = (*KINDS, "commit")
"""The calls after or before which a kill must change nothing."""

DEFECT = "a defect of this program"
"""What a log says about an exception that nobody expected."""

CRASH = """    hold(context, "train")
    pace = context.data["gate"] / "pace"
    if pace.exists():
        time.sleep(float(pace.read_text()))
    if (context.data["gate"] / f"{context.site}-{context.round}-crash").exists():
        import os
        os._exit(9)
"""
"""Job code that takes the time it is told to, and crashes whenever it gets a certain task."""

QUICK = {"heartbeat_s": 0.3, "dead_after_s": 6.0}


class Faulty(Running):
    """`Running`, started through `tests.faults.crashing`."""

    def __init__(
        self, folder: Path, sites: tuple[str, ...], tally: Tally | None = None, **limits: Any
    ) -> None:
        super().__init__(folder, sites, **{**QUICK, **limits})
        self.tally = tally or Tally()
        self.variables: dict[str, dict[str, str]] = {}
        self.prefix: dict[str, list[str]] = {}
        self.detours: dict[str, int] = {}
        for name in ("server", *sites):
            self.faults(name).mkdir()
        for name in sites:
            self.local(name, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
            self.local(name, "environments.yml", "environments: {default: {max_runs: 4}}\n")

    def faults(self, name: str) -> Path:
        """Return the folder that `tests.faults.crashing` works with."""
        return self.folder / f"faults-{name}"

    def _spawn(self, name: str) -> None:
        module = "server" if name == "server" else "client"
        (self.kit(name) / "state" / "ready.json").unlink(missing_ok=True)
        command = [
            *self.prefix.get(name, []), sys.executable, "-m", "tests.faults.crashing",
            f"flplatform.entrypoints.{module}", str(self.kit(name)),
        ]  # fmt: skip
        with (self.kit(name) / "output.txt").open("ab") as file:
            self.processes[name] = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={
                    **os.environ,
                    "OPENBLAS_NUM_THREADS": "1",
                    "FLP_FAULTS": str(self.faults(name)),
                    **self.variables.get(name, {}),
                },
            )

    def wait_ready(self, name: str) -> dict[str, Any]:
        """Return a participant's ready.json once it serves."""
        ready = super().wait_ready(name)
        self.redirect()
        return ready

    def keep_ports(self) -> None:
        """Have the server come back where it was."""
        lines = [f"{key}_address: 127.0.0.1:{self.ports[f'{key}_port']}" for key in ("fl", "admin")]
        self.local("server", "overrides.yml", "\n".join(lines))

    def redirect(self) -> None:
        """Have sites reach the server by their detours, where they have one."""
        for name, port in self.detours.items():
            self.local(name, "overrides.yml", f'servers: ["localhost:{port}"]\n')

    # ---- faults ----

    def arm(
        self,
        name: str,
        at: int,
        do: str = "kill",
        kinds: Sequence[str] = DURABLE,
        match: str = "",
        times: int = 1,
    ) -> None:
        """Order that the `at`-th call from now on is the last one, or fails."""
        folder = self.faults(name)
        (folder / "fired").unlink(missing_ok=True)
        order = {"kinds": list(kinds), "at": at, "do": do, "times": times, "match": match}
        temporary = folder / "order.tmp"
        temporary.write_text(json.dumps(order))
        temporary.rename(folder / "order.json")

    def disarm(self, name: str) -> None:
        """Take an order back."""
        (self.faults(name) / "order.json").unlink(missing_ok=True)

    def fired(self, name: str) -> bool:
        """Return whether the ordered fault has happened."""
        return (self.faults(name) / "fired").exists()

    def calls(self, name: str) -> list[str]:
        """Return the calls of a participant so far, across its restarts."""
        path = self.faults(name) / "calls.log"
        return path.read_text().splitlines() if path.exists() else []

    def ended(self, name: str) -> bool:
        """Return whether a participant's process has ended by itself."""
        return self.processes[name].poll() is not None

    def revive(self, *names: str) -> None:
        """Start again what a fault has ended."""
        for name in names:
            self.disarm(name)
            self.processes.pop(name).wait(timeout=60)
        self.start(*names)
        self.tally.recovered()

    def shift_clock(self, name: str, seconds: float) -> None:
        """Set a participant's wall clock wrong."""
        (self.faults(name) / "clock").write_text(str(seconds))

    def signal(self, name: str, number: int) -> None:
        """Send a signal and do not wait for what comes of it."""
        self.processes[name].send_signal(number)

    def kill_hard(self, name: str) -> None:
        """SIGKILL, also if it has ended already or is stopped."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)

    def run_processes(self, site: str) -> list[psutil.Process]:
        """Return the processes below a site's parent that run a job's code."""
        try:
            children = psutil.Process(self.processes[site].pid).children(recursive=True)
        except psutil.Error:
            return []
        found = []
        for child in children:
            try:
                if "flplatform.client.run_process" in child.cmdline():
                    found.append(child)
            except psutil.Error:
                continue
        return found

    # ---- jobs ----

    def job(self, name: str, **settings: Any) -> str:
        """Put the steps job into the admin's transfer folder, all its updates kept."""
        self.steps_job(name, **settings)
        code = self.kit(ADMIN) / "transfer" / name / "code" / "steps.py"
        code.write_text(code.read_text().replace('    hold(context, "train")\n', CRASH))
        file = self.kit(ADMIN) / "transfer" / name / "job.yml"
        text = file.read_text().replace("name: steps", f"name: {name}")
        file.write_text(text + "keep_updates: all\n")
        return name

    def pace(self, seconds: float) -> None:
        """Have training take so long, so that faults come while there is something to disturb."""
        (self.gate / "pace").write_text(str(seconds))

    def submit(self, name: str, **settings: Any) -> int:
        """Submit a job; return its run number."""
        self.job(name, **settings)
        done = self.console(f"submit_job {name}")
        assert done.returncode == 0, done.stdout + done.stderr
        return self.run_of(name)

    @contextmanager
    def talking(self, *lines: str) -> Iterator[subprocess.Popen[str]]:
        """Run console commands beside the test; the console has ended afterwards."""
        command = [
            sys.executable, "-m", "flplatform.entrypoints.admin", str(self.kit(ADMIN)),
            "--password-file", str(self.passphrase_file()), "--yes",
        ]  # fmt: skip
        for line in lines:
            command += ["-c", line]
        pipe = subprocess.PIPE
        console = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
        try:
            yield console
        finally:
            if console.poll() is None:
                console.kill()
            console.communicate(timeout=60)

    def run_of(self, name: str) -> int:
        """Return the run number that a job got."""
        numbered = [e for e in self.federation_events() if isinstance(e, ev.RunNumbered)]
        return next(event.run for event in reversed(numbered) if event.job_name == name)

    def federation_events(self) -> list[ev.Event]:
        """Return the federation's own stream as it is on disk."""
        return self.stream("federation")

    def events(self, run: int) -> list[ev.Event]:
        """Return a run's events as they are on disk."""
        return self.stream(ev.run_stream(run))

    def stream(self, name: str) -> list[ev.Event]:
        """Return the events of a stream as they are on disk; none before there is a log."""
        path = self.kit("server") / "state" / "events.db"
        query = "SELECT type, version, body FROM events WHERE stream=? ORDER BY seq"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            rows = database.execute(query, (name,)).fetchall()
        return [ev.decode(*row, where=name) for row in rows]

    def check_ended(self, name: str) -> None:
        """Wait for the end of a job's run, and hold it against the promises."""
        run = self.run_of(name)
        self.wait_event(run, ev.RunEnded)
        self.check(run)

    def over(self, run: int) -> bool:
        """Return whether a run has ended."""
        return any(isinstance(event, ev.RunEnded) for event in self.events(run))

    def acks(self) -> list[dict[str, str]]:
        """Return every answer to a result that a site has heard."""
        found: list[dict[str, str]] = []
        for site in self.sites:
            path = self.faults(site) / "acks.log"
            if path.exists():
                found += map(json.loads, path.read_text().splitlines())
        return found

    def log_text(self, name: str) -> str:
        """Return all that a participant has printed."""
        return (self.kit(name) / "output.txt").read_text(errors="replace")

    # ---- what must hold ----

    def check(self, run: int, digest: str = "", status: str = "finished") -> None:
        """Hold a run that has ended against the promises.

        Args:
            run: its number.
            digest: what an undisturbed run of the same job has come to.
            status: how it must have ended.
        """
        events = self.events(run)
        ended = [event for event in events if isinstance(event, ev.RunEnded)]
        assert len(ended) == 1, f"I6: run {run} ended {len(ended)} times"
        assert ended[0] is events[-1], f"I6: run {run} went on after its end"
        assert ended[0].status == status, ended[0]
        self._check_counts(run, events)
        for name in ("server", *self.sites):
            assert DEFECT not in self.log_text(name), f"{name} met what it did not expect"
        rounds = [event.round for event in events if isinstance(event, ev.RoundOpened)]
        assert rounds == list(range(1, len(rounds) + 1)), f"I4: {rounds}"
        report = verify_state(Place.of(self.kit("server")), deep=True)
        problems = [str(each) for each in report.problems]
        assert not problems, "\n".join(problems)
        again = list(replay_run(Place.of(self.kit("server")), run))
        closing = () if status == "finished" else ("waiting",)  # ended between closed and published
        assert {each.outcome for each in again} <= {"same", *closing}, f"I3: {again}"
        if digest:
            assert self.final_digest(run) == digest, "the model is not that of the undisturbed run"
        self.tally.runs += 1

    def check_against_calm(self, run: int, **settings: Any) -> None:
        """Check a run, and that it came to the digest of the same job undisturbed.

        Args:
            run: of a reproducible job that has ended.
            settings: of the job, see `job`.
        """
        done = self.console(f"submit_job {self.job('calm', **settings)} --wait")
        assert done.returncode == 0, done.stdout + done.stderr
        self.check(run, self.final_digest(self.run_of("calm")))

    def _check_counts(self, run: int, events: Iterable[ev.Event]) -> None:
        accepted: dict[str, str] = {}
        for event in events:
            if isinstance(event, ev.UpdateAccepted | ev.ResultAccepted):
                assert event.task_id not in accepted, f"I2: {event.task_id} is counted twice"
                accepted[event.task_id] = event.digest
        for ack in self.acks():
            if ack["task"].split("/")[0] == str(run):
                assert accepted.get(ack["task"]) == ack["digest"], f"I1: lost: {ack}"
