"""`python -m tests.faults soak --minutes 10`: a fault every few seconds, run after run."""

import random
import shutil
import tempfile
import time
from pathlib import Path

from flplatform.core import events as ev
from tests.faults.federations import Faulty
from tests.faults.footprint import Footprint, settled
from tests.faults.schedules import Schedule
from tests.faults.tally import Tally, table

EVERY_S = 5.0
ROUNDS = 12
MORE_FILES = 10
MORE_THREADS = 10
MORE_BYTES = 60_000_000
"""What a process may hold more than one that has done its first calm runs; restarts hide leaks,
so that every run is compared with that."""
CALM_RUNS = 10
"""After so many all threads have worked and keep the memory that they once needed: a server of
129 MB comes to 193 MB by then, and to 197 MB after 34."""


def soak(minutes: float, seed: int) -> int:
    """Go on for so long; return an exit code."""
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="flf-"))
    tally = Tally()
    tally.seeds.append(seed)
    federation = Faulty(folder, ("site-1", "site-2", "site-3"), tally)
    draw, violations = random.Random(seed), 0
    until = time.monotonic() + 60 * minutes
    try:
        federation.start_all()
        digest = _run(federation, "calm", until=0.0, schedule=None)
        for number in range(2, CALM_RUNS + 1):
            _run(federation, f"calm-{number}", 0.0, None, digest)
        young = _footprints(federation)
        schedule = Schedule(federation, draw.randrange(1 << 30))
        number = 0
        while time.monotonic() < until:
            number += 1
            schedule.forgive()
            try:
                _run(federation, f"run-{number}", until, schedule, digest)
                for name, now in _footprints(federation).items():
                    told = f"{name}: {young[name]} → {now}"
                    assert now.files <= young[name].files + MORE_FILES, told
                    assert now.threads <= young[name].threads + MORE_THREADS, told
                    assert now.memory <= young[name].memory + MORE_BYTES, told
            except (AssertionError, TimeoutError) as error:
                violations += 1
                print(f"VIOLATION {error}\n{'; '.join(schedule.story)}", flush=True)
                break
            print(f"run {number}: as undisturbed; {sum(tally.faults.values())} faults", flush=True)
    finally:
        federation.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(table(tally, violations, [])))
    return 1 if violations else 0


def _footprints(federation: Faulty) -> dict[str, Footprint]:
    return {name: settled(federation, name) for name in federation.processes}


def _run(
    federation: Faulty, name: str, until: float, schedule: Schedule | None, digest: str = ""
) -> str:
    """Have a job done, a fault every few seconds; return the digest that it comes to."""
    federation.pace(1.0 if schedule else 0.0)
    run = federation.submit(name, rounds=ROUNDS)
    while schedule and time.monotonic() < until and not federation.over(run):
        began = time.monotonic()
        schedule.one()
        rest = began + EVERY_S - time.monotonic()
        while rest > 0 and not federation.over(run):
            time.sleep(min(0.1, rest))
            rest = began + EVERY_S - time.monotonic()
    federation.wait_event(run, ev.RunEnded, deadline_s=120)
    federation.check(run, digest)
    return federation.final_digest(run)
