"""Several processes at one site, under the real torchrun: a round, a killed rank, an abort."""

import signal

import psutil
import pytest

from flplatform.client.process_tree import MARK
from flplatform.core import events as ev
from flplatform.files.modelfile import load
from tests.scenarios.conftest import ROOT

pytestmark = [pytest.mark.scenario, pytest.mark.torch, pytest.mark.timeout(300)]

CODE = """
import time
import numpy as np
import torch
from torch import distributed
from flplatform.client.api import TrainResult

def train(model, context):
    context.log_metric("rank", context.rank)
    total = torch.ones(1)
    if context.world_size > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
        print(f"rank {context.rank} trains in round {context.round}", flush=True)
        while not context.rank and hold(context):
            time.sleep(0.01)
        if context.rank and (context.data["gate"] / f"fail-{context.round}").exists():
            raise ValueError("the test asked for a failure")
        distributed.all_reduce(total)
    return TrainResult({"w": model["w"] + total.item()}, 4)

def hold(context):
    return (context.data["gate"] / f"{context.site}-{context.round}-train").exists()
"""
INITIAL = """
import numpy as np

def initial_model(args, seed):
    return {"w": np.zeros(3, np.float32)}
"""
JOB = """
name: several
workflow: [scatter_gather]
rounds: {rounds}
min_clients: 2
wait_after_min_s: 300.0
data: [gate]
executor: {{module: several}}
initial_model: {{function: "initial:initial_model"}}
"""


def several(running, rounds: int) -> None:
    """Put the job into the admin's transfer folder."""
    job = running.kit("admin@example.org") / "transfer" / "several"
    (job / "code").mkdir(parents=True)
    (job / "code" / "several.py").write_text(CODE)
    (job / "code" / "initial.py").write_text(INITIAL)
    (job / "job.yml").write_text(JOB.format(rounds=rounds))


def processes(site: str) -> dict[int, list[str]]:
    """Return the command lines of all processes that belong to a run at the site."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(f"{site}/"):
                found[process.pid] = process.cmdline()
        except psutil.Error:
            continue
    return {pid: words for pid, words in found.items() if words}


def ranks(site: str) -> dict[str, psutil.Process]:
    """Return the processes that run the job's code, by rank."""
    found = {}
    for pid, words in processes(site).items():
        if "flplatform.client.run_process" in words and "torch.distributed.run" not in words:
            process = psutil.Process(pid)
            if rank := process.environ().get("RANK"):
                found[rank] = process
    return found


def wait_printed(running, text: str, count: int = 1) -> None:
    log = running.kit("site-1") / "logs" / "run-1.log"
    running.wait_for(lambda: log.exists() and log.read_text().count(text) >= count, text)


def test_a_killed_rank_a_failed_rank_and_an_abort(federation):
    running = federation("site-1", "site-2")
    running.local("site-2", "environments.yml", "environments: {default: {max_processes: 1}}\n")
    running.start_all()
    several(running, rounds=4)
    let_go = running.hold("site-1", 1)
    done = running.console(
        "upload_folder several",
        "set_run_number 1",
        "deploy several all",
        "start_mgpu 2 --min 1",
    )
    assert "site-2 refused: rule environments.yml: max_processes = 1" in done.stdout
    done = running.console("start client site-2 --run 1")
    assert done.returncode == 0, done.stdout + done.stderr

    wait_printed(running, "rank 1 trains in round 1")
    wait_printed(running, "rank 0 trains in round 1")
    before = ranks("site-1")
    assert sorted(before) == ["0", "1"]
    before["1"].send_signal(signal.SIGKILL)
    wait_printed(running, "rank 0 trains in round 1", 2)
    assert not {process.pid for process in before.values()} & processes("site-1").keys()
    (running.gate / "fail-2").touch()
    running.hold("site-1", 3)
    let_go()

    failed = running.wait_event(1, ev.TaskFailed)
    assert "rank 1: ValueError: the test asked for a failure" in failed.error
    wait_printed(running, "rank 0 trains in round 3")
    accepted = [e for e in running.events(1) if isinstance(e, ev.UpdateAccepted)]
    assert [e.round for e in accepted if e.site == "site-1"] == [1], "one update, of rank 0"
    status = running.ask("check_status client site-1")
    assert "2 processes" in str(status)

    running.kill("site-1")
    running.wait_for(lambda: not processes("site-1"), "the ranks to end", deadline_s=15)
    running.start("site-1")
    wait_printed(running, "rank 0 trains in round 3", 2)
    assert len(ranks("site-1")) == 2
    running.ask("abort --run 1")
    running.wait_event(1, ev.RunEnded)
    running.wait_for(lambda: not processes("site-1"), "the ranks to end", deadline_s=15)


def test_one_and_two_processes_come_to_nearly_the_same(federation):
    hospitals = ("cleveland", "hungary")
    running = federation(*hospitals)
    for site in hospitals:
        path = ROOT / "workspaces" / "heart" / "data" / f"{site}.csv"
        running.local(site, "datasets.yml", f"datasets:\n  heart: {{path: {path}, allow: [any]}}\n")
        running.local(site, "environments.yml", "environments:\n  torch: {}\n")
    running.start_all()
    job = running.copy_job("heart_ddp")
    text = running.kit("admin@example.org") / "transfer" / job / "job.yml"
    text.write_text(text.read_text().replace("rounds: 15", "rounds: 2"))
    scores, models = [], []
    for run, options in ((1, "--gpus cleveland=2"), (2, "")):
        done = running.console(f"submit_job {job} {options} --wait")
        assert done.returncode == 0, done.stdout + done.stderr
        scores.append([e.score for e in running.events(run) if isinstance(e, ev.ModelScored)])
        digest = running.final_digest(run).partition(":")[2]
        (path,) = (running.kit("server") / "state" / "blobs").rglob(digest)
        models.append(load(path))
    assert len(scores[0]) == 3
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    for name, array in models[0].items():
        assert array == pytest.approx(models[1][name], abs=1e-4)
    assert "2 processes start" in (running.kit("cleveland") / "logs" / "run-1.log").read_text()
    assert "2 processes start" not in (running.kit("hungary") / "logs" / "run-1.log").read_text()
