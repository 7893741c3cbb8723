"""Clara's steps one by one, with real processes: upload, number, deploy, start, restart between."""

import pytest

from flplatform.core import events as ev

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def test_a_run_is_prepared_and_started_step_by_step(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    folder = running.steps_job(min_clients=1, rounds=1, floats=10)
    done = running.console(
        f"upload_folder {folder} --as heart",
        "list_jobs",
        "set_run_number 1",
        "deploy heart all",
        "start server",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "staged as heart (11 parameters)" in done.stdout
    assert "created run 1" in done.stdout
    assert done.stdout.count("accepts") == 2
    assert "waits for start client" in done.stdout

    running.terminate("server")
    running.start("server")
    let_go = running.hold("site-1", 1)
    done = running.console(
        "check_status server",
        "start client site-1 --run 1",
        "start client site-1",
        "deploy heart client site-2",
    )
    assert "run 1 prepared" in done.stdout
    assert "is starting" in done.stdout
    assert "takes part already" in done.stdout, "starting twice is starting once"
    assert done.returncode != 0, "a run that has begun is not prepared any more"
    assert "start client SITE" in done.stderr
    assert running.wait_event(1, ev.RunOpened).sites == ("site-1",)
    running.wait_event(1, ev.RoundOpened, round=1)

    joined = running.ask("start_mgpu 1 site-2 --run 1")
    assert joined["data"]["started"] == {"run": 1, "sites": ["site-2"], "gpus": {"site-2": 1}}
    running.wait_event(1, ev.SiteAnswered, site="site-2", accepted=True)
    let_go()
    done = running.console("check_status all", "wait 1")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = running.ask("list_runs")["data"]["runs"]
    assert [(run["run"], run["status"]) for run in listed] == [(1, "finished")]
