"""Kills during cross-site validation: the matrix is whole again, or its gaps have reasons."""

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG

pytestmark = [pytest.mark.timeout(600 if LONG else 300)]

SITES = ("site-1", "site-2", "site-3")


def cells(federation, run: int) -> tuple[set[str], dict[str, str]]:
    """Return the cells that have a result, and those that have none with the reason."""
    done, failed = set(), {}
    for event in federation.events(run):
        task = getattr(event, "task_id", "")
        if "/validate." not in task or "/validate.last/" in task:  # the last model's score
            continue
        if isinstance(event, ev.ResultAccepted):
            done.add(task)
        elif isinstance(event, ev.TaskFailed):
            failed[task] = event.error
    return done, failed


def validating(federation) -> int:
    """Return a run of which every site but site-1 has filled its row of the matrix."""
    federation.start_all()
    federation.arm("site-1", 1, "hold", ("rename",), "validate.global")
    run = federation.submit("disturbed", rounds=1)
    for site in federation.sites[1:]:
        federation.wait_for(
            lambda site=site: (
                len([each for each in cells(federation, run)[0] if each.endswith(f"/{site}")])
                == len(federation.sites) + 1
            ),
            f"{site} to validate every model",
        )
    federation.wait_for(lambda: federation.fired("site-1"), "site-1 to have validated a model")
    return run


def test_a_matrix_is_whole_although_everybody_was_killed_meanwhile(faulty):
    federation = faulty(*SITES[:2])
    run = validating(federation)
    before, _ = cells(federation, run)
    for name in ("site-1", "server", "site-2"):
        federation.kill_hard(name)
        federation.tally.fault("SIGKILL while models are validated")
    federation.disarm("site-1")
    federation.start_all()
    federation.tally.recovered()
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    done, failed = cells(federation, run)
    assert before < done, "nothing is validated again, the rest is"
    assert len(done) == 2 * 3, "every site, every site's model and the global one"
    assert failed == {}
    federation.check(run)


@pytest.mark.faults_long
def test_a_site_that_does_not_come_back_leaves_gaps_that_say_why(faulty):
    federation = faulty(*SITES)
    run = validating(federation)
    federation.kill_hard("site-1")
    federation.tally.fault("SIGKILL while models are validated")
    given_up = federation.ask(f"abort client site-1 --run {run}")
    assert f"run {run}" in str(given_up), given_up
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    done, failed = cells(federation, run)
    assert len(done) == 2 * 4
    assert len(failed) == 4
    assert all(task.endswith("/site-1") and "withdrawn" in why for task, why in failed.items())
    federation.check(run)
