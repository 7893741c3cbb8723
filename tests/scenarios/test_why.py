"""`why` on real processes: each cause by its own name, and the lineage of what comes out."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from flplatform.core import events as ev
from provisioning.provision import revoke
from workspaces.running import ADMIN

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]

QUICK = {"heartbeat_s": 0.2, "dead_after_s": 10.0}
"""Asking for a site that is silent takes two seconds, and is to be answered while it is that."""


class Talk:
    """One console for many lines: it signs in once."""

    def __init__(self, running) -> None:
        self._running = running
        self._console = subprocess.Popen(
            [
                sys.executable, "-u", "-m", "flplatform.entrypoints.admin", str(running.kit(ADMIN)),
                "--password-file", str(running.passphrase_file()), "--yes", "--json",
                "--keep-going",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def ask(self, line: str) -> dict[str, Any]:
        self._console.stdin.write(line + "\n")
        self._console.stdin.flush()
        return json.loads(self._console.stdout.readline())

    def why(self, words: str = "1") -> dict[str, Any]:
        answer = self.ask(f"why {words}")
        assert "why" in answer["data"], answer
        return {**answer["data"]["why"], "rows": {row["target"]: row for row in answer["rows"]}}

    def until(
        self, so: Callable[[dict[str, Any]], bool], what: str, words: str = "1"
    ) -> dict[str, Any]:
        """Ask until the answer is so."""
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.why(words))
            return so(found)

        self._running.wait_for(there, f"why {words} to tell of {what}", deadline_s=60)
        return found

    def close(self) -> None:
        self._console.stdin.close()
        self._console.wait(timeout=60)
        self._console.stdout.close()


@pytest.fixture
def talk():
    """Open consoles; all of them are closed afterwards."""
    opened: list[Talk] = []

    def open_one(running) -> Talk:
        opened.append(Talk(running))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def cause_of(diagnosis: dict[str, Any], site: str) -> str:
    return next((item["cause"] for item in diagnosis["waits_for"] if item["site"] == site), "")


def waits_by(site: str, *causes: str) -> Callable[[dict[str, Any]], bool]:
    return lambda diagnosis: cause_of(diagnosis, site) in causes


def run_process(running, site: str) -> psutil.Process:
    """Return the process that runs the job's code at a site."""
    parent = psutil.Process(running.processes[site].pid)
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "flplatform.client.run_process" in child.cmdline():
                return child
    raise AssertionError(f"no job's code runs at {site}")


def test_causes_of_one_round_and_what_came_of_it(federation, talk):
    running = federation("site-1", "site-2", "site-3", **QUICK)
    running.start("server", "site-1", "site-2")
    console = talk(running)
    assert console.why("site-3")["cause"] == "never_registered"
    running.steps_job(min_clients=2, rounds=1)
    let_go = running.hold("site-2", 1)
    done = running.console("submit_job steps --sites site-1,site-2")
    assert done.returncode == 0, done.stdout + done.stderr
    running.wait_event(1, ev.UpdateAccepted, site="site-1")
    waits = console.until(
        lambda found: (
            waits_by("site-2", "working", "slow")(found)
            and found["rows"]["site-2"].get("cells", {}).get("phase") == "train"
        ),
        "a site at work",
    )
    assert waits["cause"] == "training"
    assert "quorum 2 not reached (1 accepted)" in waits["headline"]
    assert "set_min_clients 1 --run 1" in waits["can"]
    assert waits["next"][0]["in_s"] > 300

    run_process(running, "site-2").kill()
    crashed = console.until(waits_by("site-2", "crashing"), "a crash")
    assert "crashed 1 of 3" in crashed["waits_for"][0]["text"]
    errors = crashed["sites"]["site-2"]["body"]["errors"]
    assert "was killed by SIGKILL" in errors[-1]["text"]

    running.processes["site-2"].send_signal(signal.SIGSTOP)
    try:
        silent = console.until(waits_by("site-2", "silent"), "a silent site")
        assert silent["rows"]["site-2"]["status"] == "no_reply"
        assert any("counts as dead" in item["text"] for item in silent["next"])
        away = console.until(waits_by("site-2", "away"), "a site that is away")
        assert away["rows"] == {}
        gone = console.why("site-2")
        assert (gone["cause"], gone["can"]) == ("away", ["why 1"])
    finally:
        running.processes["site-2"].send_signal(signal.SIGCONT)
    let_go()
    assert running.wait_event(1, ev.RunEnded).status == "finished"
    assert console.why()["cause"] == "finished"
    parts = {part["site"]: part for part in console.why("1 1")["parts"]}
    assert [parts[site]["outcome"] for site in ("site-1", "site-2")] == ["accepted", "accepted"]
    assert parts["site-2"]["took_s"] > parts["site-1"]["took_s"]
    lineage = console.ask("lineage 1 --verify")
    assert [each["result"] for each in lineage["data"]["verified"]] == ["same"]
    (first,) = lineage["data"]["lineage"]["rounds"]
    assert sum(share["share"] for share in first["shares"]) == pytest.approx(1.0)
    assert console.ask("taskname")["data"]["taskname"]["job"] == "steps"


def test_why_runs_end_and_why_they_do_not_begin(federation, talk):
    running = federation("site-1", "site-2", "site-3", **QUICK)
    running.local("site-2", "policy.yml", "byoc: [none]\n")
    running.local("site-3", "resources.yml", f"reserve_bytes: {1 << 60}\n")
    running.start_all()
    console = talk(running)
    running.steps_job(min_clients=1, rounds=1)
    (running.gate / "site-1-1-fail").touch()
    done = running.console("submit_job steps --sites site-1,site-2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert running.wait_event(1, ev.RunEnded).status == "failed"
    failed = console.why()
    assert failed["cause"] == "task_failed"
    told = [line["text"] for line in failed["lines"]]
    assert any("steps.py" in text for text in told)
    assert any(text.startswith("site-2 declined") and "byoc" in text for text in told)
    assert "the test asked for a failure" in str(failed["sites"]["site-1"]["body"]["errors"])
    parts = {part["site"]: part for part in console.why("1 1")["parts"]}
    assert parts["site-2"]["outcome"] == "not in"
    assert "byoc" in parts["site-2"]["why"]

    running.steps_job("full", min_clients=1, rounds=1)
    assert running.console("submit_job full --sites site-3").returncode == 0

    def held_up(diagnosis: dict[str, Any]) -> bool:
        body = diagnosis["sites"].get("site-3", {}).get("body", {})
        return "resource_exhausted" in body.get("held_up", "")

    full = console.until(held_up, "a site without space", "2")
    assert (full["cause"], cause_of(full, "site-3")) == ("deploying", "no_answer")
    assert "reserve" in str(full["sites"]["site-3"]["body"]["errors"])
    assert any(command.startswith("abort") for command in full["can"])


def test_a_revoked_certificate_and_a_server_without_space(federation, talk):
    running = federation("site-1", "site-2", **QUICK)
    startup = running.kit("site-2") / "startup"
    kept = startup.with_name("kept")
    shutil.copytree(startup, kept)
    revoke(running.folder, "site-2")
    shutil.rmtree(startup)
    kept.rename(startup)  # the site has not heard of it: the server must refuse it
    running.start("server")
    running.start("site-1")
    running._spawn("site-2")
    console = talk(running)
    shut_out = console.until(
        lambda diagnosis: diagnosis["cause"] == "certificate", "a revoked site", "site-2"
    )
    assert "the certificate of site-2 is revoked" in shut_out["headline"]
    running.steps_job(min_clients=1, rounds=1)
    let_go = running.hold("site-1", 1)
    assert running.console("submit_job steps --sites site-1").returncode == 0
    running.wait_event(1, ev.RoundOpened)
    running.kill("server")
    running.local("server", "resources.yml", f"reserve_bytes: {1 << 60}\n")
    running.start("server")
    let_go()
    full = talk(running).until(waits_by("site-1", "disk_full"), "a server without space")
    assert "reserve" in str(full["lines"])
