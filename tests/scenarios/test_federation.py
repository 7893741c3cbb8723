"""The whole walk with real processes: provision, train on four hospitals, validate, download."""

import json
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from flplatform.core import events as ev
from tests.scenarios.conftest import ROOT

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]

HOSPITALS = ("cleveland", "hungary", "switzerland", "va")


def test_four_hospitals(federation):
    running = federation(*HOSPITALS)
    for site in HOSPITALS:
        path = ROOT / "workspaces" / "heart" / "data" / f"{site}.csv"
        running.local(site, "datasets.yml", f"datasets:\n  heart: {{path: {path}, allow: [any]}}\n")
    running.start_all()
    running.copy_job("heart")
    done = running.console("submit_job heart --wait")
    assert done.returncode == 0, done.stdout + done.stderr

    status = running.ask("check_status all")
    assert [row["target"] for row in status["rows"]] == ["server", *HOSPITALS]
    assert {row["status"] for row in status["rows"]} == {"ok"}

    metrics = running.ask("show_metrics 1")
    assert metrics["ok"]
    scores = [e for e in running.events(1) if isinstance(e, ev.ModelScored)]
    assert [event.round for event in scores] == list(range(16))
    best = max(scores, key=lambda event: (event.score, -event.round))
    assert best.score > 0.72 > scores[0].score

    matrix = running.ask("cross_val 1")
    text = json.dumps(matrix["data"])
    assert all(name in text for name in (*HOSPITALS, "global"))
    results = [e for e in running.events(1) if isinstance(e, ev.ResultAccepted)]
    cells = [e.task_id for e in results if "/validate." in e.task_id and "last" not in e.task_id]
    assert len(cells) == 5 * 4

    target = running.folder / "best.safetensors"
    done = running.console(f"download_model 1 best --to {target}")
    assert done.returncode == 0, done.stdout + done.stderr
    model = load_file(target)
    assert {name: array.shape for name, array in model.items()} == {
        "linear.weight": (1, 13),
        "linear.bias": (1,),
    }
    again = running.console(f"download_model 1 best --to {target}")
    assert again.returncode != 0, "an existing file must not be overwritten"


def test_nothing_loads_a_framework(federation):
    running = federation("site-1")
    running.start_all()
    for name in ("server", "site-1"):
        maps = (f"/proc/{running.processes[name].pid}/maps",)
        with open(maps[0]) as file:
            text = file.read()
        assert "torch" not in text
        assert "tensorflow" not in text


@pytest.mark.parametrize("module", ["server", "client", "admin"])
def test_entry_points_import_no_framework(module):
    code = (
        f"import sys, flplatform.entrypoints.{module}; "
        "print([m for m in ('torch','tensorflow','sklearn','pandas','ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
