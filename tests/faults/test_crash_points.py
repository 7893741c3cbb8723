"""kill -9 at the k-th call that makes something durable, before it and after it.

One run takes a whole series of kills, and counts as proved if it ends with the model that the same
job comes to undisturbed. The calm run is the second one: updates that are on the server already
are not sent again, so that it must not come first.
"""

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.federations import DURABLE

pytestmark = pytest.mark.timeout(1800 if LONG else 300)

SERIES = 8
"""Kills of one run; each may take two rounds."""

SERVER = range(1, 41) if LONG else (1, 4, 7, 12)
SITE = range(1, 81) if LONG else (2, 17, 24, 33)
AT_START = range(1, 33) if LONG else (14,)
"""Positions after the submission has begun: audit, upload, deployment."""


def series(points):
    """Cut (position, what) pairs into the series of single runs."""
    both = [(at, do) for number, at in enumerate(points) for do in _ways(number)]
    return [both[start : start + SERIES] for start in range(0, len(both), SERIES)]


def _ways(number):
    return ("kill", "killed") if LONG else (("kill", "killed")[number % 2],)


def calm(federation, rounds: int) -> str:
    """Run the job undisturbed and return the digest of its model."""
    done = federation.console(f"submit_job {federation.job('calm', rounds=rounds)} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    run = federation.run_of("calm")
    federation.check(run)
    return federation.final_digest(run)


def disturb(federation, name: str, points, rounds: int) -> None:
    federation.start_all()
    run = federation.submit("disturbed", rounds=rounds)
    federation.wait_event(run, ev.RoundOpened, round=1)
    for at, do in points:
        federation.arm(name, at, do)
        over = f"{name} to be killed at call {at}"
        federation.wait_for(lambda: federation.ended(name) or finished(federation, run), over)
        if not federation.ended(name):
            break  # the run was over before its last kill: what came before counts
        federation.tally.fault(f"SIGKILL {name.split('-')[0]} {_before(do)} a durable call")
        federation.revive(name)
    federation.disarm(name)
    federation.wait_event(run, ev.RunEnded)
    federation.check(run, digest=calm(federation, rounds))


def _before(do: str) -> str:
    return "before" if do == "kill" else "after"


def finished(federation, run: int) -> bool:
    return any(isinstance(event, ev.RunEnded) for event in federation.events(run))


@pytest.mark.parametrize("points", series(SERVER), ids=str)
def test_server_is_killed_at_every_call(faulty, points):
    disturb(faulty("site-1", "site-2"), "server", points, rounds=3 * len(points))


@pytest.mark.parametrize("points", series(SITE), ids=str)
def test_site_is_killed_at_every_call(faulty, points):
    disturb(faulty("site-1", "site-2"), "site-1", points, rounds=4 * len(points))


@pytest.mark.parametrize("at", AT_START)
@pytest.mark.parametrize("name", ["server", pytest.param("site-1", marks=pytest.mark.faults_long)])
def test_killed_while_a_run_begins(faulty, name, at):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    federation.job("disturbed", rounds=2)
    federation.arm(name, at)
    with federation.talking("submit_job disturbed") as console:
        federation.wait_for(lambda: federation.fired(name), f"{name} to be killed at call {at}")
        federation.tally.fault(f"SIGKILL {name.split('-')[0]} while a run begins")
        federation.revive(name)
        told, problem = console.communicate(timeout=90)
    if console.returncode != 0:  # the admin is told, and asks again
        assert problem.strip(), told
        # Sites that have not come back yet are no targets unless they are named.
        done = federation.console("submit_job disturbed --sites site-1,site-2")
        assert done.returncode == 0, done.stdout + done.stderr
    numbered = [e.run for e in federation.federation_events() if isinstance(e, ev.RunNumbered)]
    for run in numbered:
        federation.wait_event(run, ev.RunEnded)
    digest = calm(federation, 2)
    for run in numbered:
        federation.check(run, digest)


def test_which_calls_there_are(faulty):
    """The series above stand for every instant only as long as they reach all calls."""
    federation = faulty("site-1")
    federation.start_all()
    federation.wait_event(federation.submit("counted", rounds=2), ev.RunEnded)
    assert {line.split()[0] for line in federation.calls("server")} == {
        "fsync", "fdatasync", "replace", "commit",
    }  # fmt: skip
    assert {line.split()[0] for line in federation.calls("site-1")} <= set(DURABLE)
    begun = next(i for i, line in enumerate(federation.calls("site-1")) if "/work/" in line)
    assert begun >= 6, "a site is to be killed before its first task too"
