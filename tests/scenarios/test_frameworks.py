"""The heart job in PyTorch and in TensorFlow, through the platform."""

import pytest

from flplatform.core import events as ev
from tests.scenarios.conftest import ROOT

HOSPITALS = ("cleveland", "hungary", "switzerland", "va")


@pytest.mark.scenario
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "framework",
    [
        pytest.param("torch", marks=pytest.mark.torch),
        pytest.param("tensorflow", marks=pytest.mark.tensorflow),
    ],
)
def test_heart_job_in(framework, federation):
    running = federation(*HOSPITALS)
    for site in HOSPITALS:
        path = ROOT / "workspaces" / "heart" / "data" / f"{site}.csv"
        running.local(site, "datasets.yml", f"datasets:\n  heart: {{path: {path}, allow: [any]}}\n")
        running.local(site, "environments.yml", f"environments:\n  {framework}: {{}}\n")
    running.start_all()
    job = running.copy_job(f"heart_{framework}")
    text = running.kit("admin@example.org") / "transfer" / job / "job.yml"
    text.write_text(text.read_text().replace("rounds: 15", "rounds: 4"))
    done = running.console(f"submit_job {job} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    scores = [e.score for e in running.events(1) if isinstance(e, ev.ModelScored)]
    assert max(scores) > 0.65
    assert len(scores) == 5
