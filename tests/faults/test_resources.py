"""What aborted runs leave behind: nothing."""

import time

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.footprint import settled
from tests.scenarios.test_why import Talk

pytestmark = pytest.mark.timeout(1800 if LONG else 150)

WARM_UP = 3
RUNS = 50 if LONG else 3
MORE_BYTES_PER_RUN = 400_000
"""What the memory of a process may grow by: a run's log is kept, caches fill."""


def abort_one(federation, console, number: int) -> None:
    name = federation.job(f"job-{number}", rounds=2, floats=1000 + number)  # each its own model
    answer = console.ask(f"submit_job {name}")
    assert answer["ok"], answer
    run = federation.run_of(name)
    federation.wait_event(run, ev.RoundOpened)
    assert console.ask(f"abort all --run {run}")["ok"]
    federation.wait_event(run, ev.RunEnded)


def test_aborted_runs_leave_nothing_behind(faulty):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    for site in federation.sites:
        federation.hold(site, 1)
    console = Talk(federation)
    try:
        for number in range(WARM_UP):
            abort_one(federation, console, number)
        before = {name: settled(federation, name) for name in ("server", "site-1")}
        for number in range(WARM_UP, WARM_UP + RUNS):
            abort_one(federation, console, number)
            federation.tally.fault("abort of a short run")
            federation.tally.runs += 1
        time.sleep(1)  # for what may still be started behind the last abort
        for name, base in before.items():
            now = settled(federation, name)
            told = f"{name}: {base} → {now}"
            assert now.threads <= base.threads + 2, told
            assert now.files <= base.files + 3, told
            assert now.memory <= base.memory + 8e6 + RUNS * MORE_BYTES_PER_RUN, told
    finally:
        console.close()
