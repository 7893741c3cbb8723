"""fl_state beside a real server; a backup, a lost state, and the run goes on from it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def fl_state(*words: object) -> str:
    """Run the tool; return what it says."""
    command = [sys.executable, "-m", "flplatform.entrypoints.state", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return f"{done.returncode}: {done.stdout}{done.stderr}"


def test_check_back_up_lose_restore_and_go_on(federation, tmp_path: Path) -> None:
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job("calm")
    done = running.console("submit_job calm --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = running.final_digest(1)
    running.steps_job("disturbed")
    let_go = running.hold("site-1", 2)
    done = running.console("submit_job disturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    running.wait_event(2, ev.UpdateAccepted, round=2, site="site-2")
    kit = running.kit("server")

    assert fl_state("verify", kit, "--deep").startswith("0: no problem in 2 runs")
    assert fl_state("backup", kit, tmp_path / "b").startswith("0: backed up 2 runs")
    with pytest.raises(FailedPreconditionError, match="in use by process"):
        restore(tmp_path / "b", Place.of(kit), move_aside=True)

    running.kill("server")
    shutil.rmtree(kit / "state")
    assert fl_state("restore", tmp_path / "b", kit).startswith("0: restored 2 runs")
    running.start("server")
    let_go()
    assert running.wait_event(2, ev.RunEnded).status == "finished"
    assert running.final_digest(2) == expected
    assert not verify_state(Place.of(kit), deep=True).problems
    assert all(each.outcome != "differs" for each in replay_run(Place.of(kit), 2))
