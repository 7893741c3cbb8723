"""kill -9 at the worst moments: the run goes on, and a reproducible job's model does not change."""

import pytest

from flplatform.core import events as ev

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def submit(running, job: str) -> None:
    """Submit without waiting for the end."""
    done = running.console(f"submit_job {job}")
    assert done.returncode == 0, done.stdout + done.stderr


def undisturbed(running, **settings):
    running.steps_job("calm", **settings)
    done = running.console("submit_job calm --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return running.final_digest(1)


def accepted(running, run: int) -> list[str]:
    return [e.task_id for e in running.events(run) if isinstance(e, ev.UpdateAccepted)]


def test_server_killed_in_the_middle_of_a_round(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    expected = undisturbed(running)
    running.steps_job("disturbed")
    let_go = running.hold("site-1", 2)
    submit(running, "disturbed")
    running.wait_event(2, ev.UpdateAccepted, round=2, site="site-2")
    before = running.events(2)
    running.kill("server")
    running.start("server")
    let_go()
    ended = running.wait_event(2, ev.RunEnded)
    after = running.events(2)
    assert ended.status == "finished"
    assert after[: len(before)] == before
    assert running.final_digest(2) == expected
    assert len(accepted(running, 2)) == len(set(accepted(running, 2))) == 4


def test_site_killed_while_training(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    expected = undisturbed(running)
    running.steps_job("disturbed")
    let_go = running.hold("site-1", 2)
    submit(running, "disturbed")
    running.wait_event(2, ev.UpdateAccepted, round=2, site="site-2")
    running.kill("site-1")
    let_go()
    running.start("site-1")
    assert running.wait_event(2, ev.RunEnded).status == "finished"
    assert running.final_digest(2) == expected


def test_site_killed_during_an_upload(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    big = {"floats": 25_000_000, "rounds": 1}
    # The undisturbed run comes second here: its updates are the same bytes, so that a server
    # which had them already would not have them sent again.
    running.steps_job("disturbed", **big)
    let_go = running.hold("site-1", 1)
    submit(running, "disturbed")
    running.wait_event(1, ev.UpdateAccepted, round=1, site="site-2")
    incoming = running.kit("server") / "state" / "blobs" / "incoming"
    let_go()
    running.wait_for(
        lambda: any(path.stat().st_size for path in incoming.glob("*.part")), "an upload to begin"
    )
    running.kill("site-1")
    assert "site-1" not in {e.site for e in running.events(1) if isinstance(e, ev.UpdateAccepted)}
    running.start("site-1")
    assert running.wait_event(1, ev.RunEnded).status == "finished"
    running.steps_job("calm", **big)
    done = running.console("submit_job calm --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert running.final_digest(1) == running.final_digest(2)


def test_everybody_killed(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    expected = undisturbed(running)
    running.steps_job("disturbed")
    let_go = running.hold("site-1", 2)
    submit(running, "disturbed")
    running.wait_event(2, ev.UpdateAccepted, round=2, site="site-2")
    for name in ("server", "site-1", "site-2"):
        running.kill(name)
    let_go()
    running.start_all()
    assert running.wait_event(2, ev.RunEnded).status == "finished"
    assert running.final_digest(2) == expected
