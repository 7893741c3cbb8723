"""Random kill schedules, while a reproducible run and one with deadlines are at work."""

import os

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.schedules import Schedule

pytestmark = pytest.mark.timeout(900 if LONG else 300)

FIRST = int(os.environ.get("FAULTS_SEED", "1"))
SEEDS = range(FIRST, FIRST + (40 if LONG else 1))
FAULTS = 25 if LONG else 6
ROUNDS = 40 if LONG else 12


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_schedule(faulty, tally, seed):
    federation = faulty("site-1", "site-2", "site-3")
    federation.start_all()
    tally.seeds.append(seed)
    federation.pace(0.4)
    steady = federation.submit("steady", rounds=ROUNDS)
    hasty = federation.submit(
        "hasty", rounds=ROUNDS, min_clients=1, wait_after_min_s=0.2, round_deadline_s=20.0
    )
    schedule = Schedule(federation, seed)
    try:
        schedule.play(FAULTS, lambda: federation.over(steady) and federation.over(hasty))
        for run in (steady, hasty):
            federation.wait_event(run, ev.RunEnded, deadline_s=240)
        federation.pace(0)
        federation.check_against_calm(steady, rounds=ROUNDS)
        federation.check(hasty)
    except (AssertionError, TimeoutError) as error:
        everyone = ("server", *federation.sites)
        logs = [f"{name}:\n{federation.log_text(name)[-3000:]}" for name in everyone]
        story = "; ".join(schedule.story)
        raise AssertionError("\n".join([f"seed {seed}: {story}", *logs])) from error
