"""`make demo`, as the README promises it."""

import os
import subprocess
import sys

import pytest

from tests.scenarios.conftest import ROOT


@pytest.mark.scenario
@pytest.mark.timeout(300)
def test_the_demo_trains_validates_and_stops(tmp_path):
    folder = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "workspaces.federation", "demo"],
        cwd=ROOT,
        env={**os.environ, "FLP_DEMO_FOLDER": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 15/15 closed" in done.stdout
    assert "global (r" in done.stdout
    assert "isolation of the job's code: " in done.stdout
    kits = list((folder / "heart" / "kits").iterdir())
    assert len(kits) == 6
    assert not [kit for kit in kits if (kit / "state" / "ready.json").exists()]
