"""Logs of a run at real sites: live while it goes on, through a kill, and what a failure leaves."""

import json
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

from flplatform.core import events as ev
from workspaces.running import ADMIN

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]

TALKING = '''
"""Says what it does, and waits while the test holds a file for this task."""
import time
import numpy as np
from flplatform.client.api import TrainResult, ValidateResult

def initial_model(args, seed):
    return {"w": np.zeros(4, np.float32)}

def train(model, context):
    print(f"begin {context.site} {context.round}", flush=True)
    gate = context.data["gate"]
    while (gate / f"{context.site}-{context.round}-train").exists():
        time.sleep(0.01)
    if (gate / "fail").exists() and context.site == "site-1":
        raise ValueError("the gradient has exploded")
    print(f"end {context.site} {context.round}", flush=True)
    return TrainResult({"w": model["w"] + 1}, 10)

def validate(model, context):
    return ValidateResult({"size": 1.0}, 10)
'''

LINE = re.compile(r"(\d{4}-\S+Z) (\S+) (\w+) \| (.*)")


class Following:
    """A console that follows a log; its lines with the times at which they came."""

    def __init__(self, running, line: str) -> None:
        command = [
            sys.executable, "-m", "flplatform.entrypoints.admin", str(running.kit(ADMIN)),
            "--password-file", str(running.passphrase_file()), "-c", line,
        ]  # fmt: skip
        self.lines: list[tuple[datetime, str]] = []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                with self._came:
                    self.lines.append((datetime.now(UTC), line.rstrip("\n")))
                    self._came.notify_all()
        with self._came:
            self._came.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def shows(self, text: str, deadline_s: float = 60) -> None:
        """Wait until a line holds a text."""
        until = time.monotonic() + deadline_s
        with self._came:
            while not any(text in line for _, line in self.lines):
                if not self._came.wait(until - time.monotonic()):
                    raise TimeoutError(f"waited for {text!r} in\n{self.text}")

    def ends(self, deadline_s: float = 60) -> int:
        """Return the exit code."""
        code = self.process.wait(deadline_s)
        self._reader.join(deadline_s)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def following():
    made: list[Following] = []

    def make(running, line: str) -> Following:
        made.append(Following(running, line))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def talking_job(running, name: str, **settings) -> str:
    running.steps_job(name, **settings)
    code = running.kit(ADMIN) / "transfer" / name / "code" / "steps.py"
    code.write_text(TALKING)
    return name


def test_a_run_is_followed_through_the_kill_of_a_site(federation, following):
    running = federation("site-1", "site-2", heartbeat_s=0.2, dead_after_s=2.0)
    running.start_all()
    job = talking_job(running, "talking", rounds=2, min_clients=1, wait_after_min_s=100.0)
    holds = {site: running.hold(site, 2) for site in ("site-1", "site-2")}
    assert running.console(f"submit_job {job}").returncode == 0
    running.wait_event(1, ev.RoundOpened, round=1)
    log = following(running, "logs -f 1")
    # Live, of both, while the run goes on.
    for site in ("site-1", "site-2"):
        log.shows(f"{site} job | begin {site} 2")
    assert log.process.poll() is None
    running.kill("site-2")
    log.shows("site-2 log | not connected")
    running.start("site-2")
    for let_go in holds.values():
        let_go()
    code = log.ends()
    assert code == 0, log.text
    assert "server event | finished" in log.text
    for site in ("site-1", "site-2"):
        for line in (f"begin {site} 1", f"end {site} 1", f"begin {site} 2", f"end {site} 2"):
            assert f"{site} job | {line}" in log.text, log.text
    shown = [LINE.fullmatch(line) for _, line in log.lines]
    assert all(shown), log.text
    # Each line once, and each source in its own order.
    assert len({line for _, line in log.lines}) == len(log.lines), log.text
    for site in ("site-1", "site-2"):
        times = [found[1] for found in shown if found and found.group(2, 3) == (site, "job")]
        assert times == sorted(times)
    delays = [
        (came - datetime.fromisoformat(found[1])).total_seconds()
        for (came, _), found in zip(log.lines, shown, strict=True)
        if found and found[4] == "end site-1 2"
    ]
    assert min(delays) < 5.0, log.text

    # A run that fails: its log ends with what failed it, and where.
    (running.gate / "fail").touch()
    job = talking_job(running, "failing", rounds=1, min_clients=2)
    assert running.console(f"submit_job {job} --wait").returncode == 5
    commands = (
        "logs 2", "logs 2 site-1 --grep begin", "show_errors all", "show_stats all",
        "reset_errors client site-1", "show_errors client site-1",
    )  # fmt: skip
    done = running.console(*commands, options=["--json"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["exit_code"] for answer in answers] == [0] * len(commands), done.stdout
    answer, grep, errors, stats, reset, afterwards = answers
    failure = answer["data"]["failure"]
    assert failure["site"] == "site-1"
    assert failure["traceback"].endswith("ValueError: the gradient has exploded")
    assert answer["text"][-1].splitlines()[-1] == "ValueError: the gradient has exploded"
    assert "at site-1, in task 2/1/train/site-1" in answer["text"][-1]
    assert {line["source"] for line in answer["data"]["logs"]} == {"server", "site-1", "site-2"}
    assert [line["text"] for line in grep["data"]["logs"]] == ["begin site-1 1"]

    assert "exploded" in str(errors["data"]["errors"]["site-1"]["last"])
    server, site = (stats["data"]["stats"][name] for name in ("server", "site-1"))
    assert server["rpcs"]["Register ok"]["count"] >= 3
    assert server["received_bytes"]["site-1"] > 0
    assert (site["tasks_done"] >= 2, site["tasks_failed"]) == (True, 1)
    assert reset["rows"][0]["cells"]["reset"] > 0
    assert afterwards["data"]["errors"]["site-1"]["counts"] == []
