"""What a round does when sites are slow, fail, leave or come; and that it can be recomputed."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from flplatform.core import events as ev
from flplatform.server.aggregation import aggregate_closed
from flplatform.store.blobs import FileBlobStore

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def recompute(running, run: int) -> list[tuple[str, str]]:
    """Aggregate every closed round again from its event; return (published, recomputed)."""
    blobs = FileBlobStore(running.kit("server") / "state" / "blobs")
    events = running.events(run)
    published = {e.round: e.model.digest for e in events if isinstance(e, ev.ModelPublished)}
    pairs = []
    with ThreadPoolExecutor(2) as pool:
        for closed in (e for e in events if isinstance(e, ev.RoundClosed)):
            model, _ = aggregate_closed(blobs, closed, pool)
            pairs.append((published[closed.round], model.digest))
    return pairs


def test_deadline_closes_without_the_straggler(federation):
    running = federation("site-1", "site-2", "site-3")
    running.start_all()
    running.steps_job(min_clients=2, wait_after_min_s=600, round_deadline_s=2, rounds=2)
    let_go = running.hold("site-3", 1)
    done = running.console("submit_job steps --sites site-1,site-2,site-3")
    assert done.returncode == 0, done.stdout + done.stderr
    closed = running.wait_event(1, ev.RoundClosed, round=1)
    assert closed.reason == "deadline"
    assert closed.stragglers == ("site-3",)
    let_go()
    assert running.wait_event(1, ev.RunEnded).status == "finished"
    pairs = recompute(running, 1)
    assert len(pairs) == 2
    assert all(published == again for published, again in pairs)


def test_deadline_survives_a_killed_server(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job(min_clients=1, wait_after_min_s=600, round_deadline_s=3, rounds=2)
    let_go = running.hold("site-2", 1)
    assert running.console("submit_job steps").returncode == 0
    running.wait_event(1, ev.UpdateAccepted, site="site-1")
    running.kill("server")
    running.start("server")
    closed = running.wait_event(1, ev.RoundClosed, round=1)
    assert [target.site for target in closed.contributions] == ["site-1"]
    let_go()
    assert running.wait_event(1, ev.RunEnded).status == "finished"
    assert all(published == again for published, again in recompute(running, 1))


def test_quorum_and_wait(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job(min_clients=1, wait_after_min_s=0.5, rounds=1)
    let_go = running.hold("site-2", 1)
    assert running.console("submit_job steps").returncode == 0
    assert running.wait_event(1, ev.RoundClosed).reason == "quorum and wait_after_min_s"
    let_go()
    assert running.wait_event(1, ev.RunEnded).status == "finished"


def test_lowering_the_quorum_closes_the_round(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job(min_clients=2, wait_after_min_s=0.1, rounds=1)
    let_go = running.hold("site-2", 1)
    assert running.console("submit_job steps").returncode == 0
    running.wait_event(1, ev.UpdateAccepted, site="site-1")
    assert running.ask("set_min_clients 1 --run 1")["ok"]
    running.wait_event(1, ev.RoundClosed, round=1)
    let_go()
    assert running.wait_event(1, ev.RunEnded).status == "finished"


def test_failing_code_fails_the_run_with_its_traceback(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job()
    (running.gate / "site-2-2-fail").touch()
    done = running.console("submit_job steps --wait")
    assert done.returncode == 5
    assert "the test asked for a failure" in done.stdout + done.stderr
    failed = running.wait_event(1, ev.TaskFailed, site="site-2")
    assert "steps.py" in failed.traceback
    assert running.wait_event(1, ev.RunEnded).status == "failed"


def test_nan_update_is_refused_by_name(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job(min_clients=1)
    (running.gate / "site-2-1-nan").touch()
    done = running.console("submit_job steps --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    failed = running.wait_event(1, ev.TaskFailed, site="site-2")
    assert "'w'" in failed.error
    assert "NaN" in failed.error
    closed = running.wait_event(1, ev.RoundClosed, round=1)
    assert [target.site for target in closed.contributions] == ["site-1"]


def test_abort_frees_the_run_process(federation):
    running = federation("site-1")
    running.start_all()
    running.steps_job()
    running.hold("site-1", 1)
    assert running.console("submit_job steps").returncode == 0
    running.wait_event(1, ev.RoundOpened)
    assert running.ask("abort all --run 1")["ok"]
    assert running.wait_event(1, ev.RunEnded).status == "aborted"
    runs = running.kit("site-1") / "state" / "runs"
    running.wait_for(lambda: not any(runs.glob("run-*")), "the site to end the run")
