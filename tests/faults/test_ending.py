"""SIGTERM in every phase of a run, once and twice: the process ends, the run goes on."""

import signal
import time

import pytest

from flplatform.core import events as ev
from flplatform.entrypoints.process import EXIT_FAILED, EXIT_STOPPED, ONE_PRESS_S
from tests.faults import test_lifecycle as phases
from tests.faults.test_lifecycle import DRAIN_S

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(600)]

TWICE_S = 5.0
"""A second signal does not wait: so long may the end take then."""

PHASES = {
    "training": {"rounds": 3},
    "spooling": {"rounds": 3},
    "uploading": {"rounds": 3, "floats": 2000},
    "aggregating": {"rounds": 3},
    "validating": {"rounds": 1},
}


def go_on(federation, phase: str, run: int) -> None:
    """Let a run go on whose processes run again; it comes to what it would have come to."""
    for path in federation.gate.glob("*-train"):
        path.unlink()
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    federation.check_against_calm(run, **PHASES[phase])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["server", "site-1"])
def test_asked_to_end_in_every_phase(faulty, phase, name):
    federation = faulty("site-1", "site-2")
    run = getattr(phases, phase)(federation)
    began = time.monotonic()
    federation.signal(name, signal.SIGTERM)
    for each in ("server", "site-1"):
        federation.disarm(each)
    assert federation.processes[name].wait(timeout=DRAIN_S) == EXIT_STOPPED
    federation.tally.fault(f"SIGTERM while {phase}")
    assert time.monotonic() - began < DRAIN_S
    federation.revive(name)
    go_on(federation, phase, run)


@pytest.mark.parametrize(("phase", "name"), [("aggregating", "server"), ("spooling", "site-1")])
def test_asked_twice_it_ends_at_once_and_loses_nothing(faulty, phase, name):
    """The disk hangs: the first signal waits for it, the second one does not."""
    federation = faulty("site-1", "site-2")
    run = getattr(phases, phase)(federation)
    before = federation.events(run)
    federation.signal(name, signal.SIGTERM)
    federation.wait_for(lambda: " ends" in federation.log_text(name), f"{name} to begin to end")
    time.sleep(ONE_PRESS_S)  # what comes sooner is the same press of Ctrl-C
    assert not federation.ended(name), "it waits for what is being written"
    again = time.monotonic()
    federation.signal(name, signal.SIGTERM)
    assert federation.processes[name].wait(timeout=DRAIN_S) == EXIT_FAILED
    assert time.monotonic() - again < TWICE_S
    federation.tally.fault(f"SIGTERM twice while {phase}")
    federation.revive(name)
    assert federation.events(run)[: len(before)] == before
    go_on(federation, phase, run)
