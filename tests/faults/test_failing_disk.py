"""Failed syncs end the process, and a restart recovers; a full disk is waited for."""

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG

pytestmark = pytest.mark.timeout(600 if LONG else 300)

EXIT = 70
"""docs/operating.md: a write or fsync failed."""

ROUNDS = 6

IN_DURABLE = [
    ("server", "commit", ""),
    ("server", "fsync", "audit.jsonl"),
    ("server", "fsync", "state/blobs"),
    ("site-1", "fsync", "-result.json"),
    ("site-1", "fsync", "spool/entries"),
    ("site-1", "fsync", "spool/adopting"),
]
ELSEWHERE = [
    ("server", "fdatasync", "incoming"),
    ("server", "fsync", "-blob"),
    ("site-1", "fdatasync", "incoming"),
    ("site-1", "fsync", "result.safetensors"),
]
QUICK = [IN_DURABLE[0], IN_DURABLE[5]]


def begin(federation, **settings) -> int:
    federation.start_all()
    run = federation.submit("disturbed", rounds=ROUNDS, **settings)
    federation.wait_event(run, ev.RoundOpened, round=2)
    return run


def finish(federation, run: int) -> None:
    federation.wait_event(run, ev.RunEnded)
    federation.check_against_calm(run, rounds=ROUNDS)


def fail_once(federation, name: str, kind: str, match: str) -> None:
    if match == "audit.jsonl":
        federation.console("check_status server")  # not audited; the console is warm
    federation.arm(name, 1, "EIO", (kind,), match)
    if match == "audit.jsonl":
        federation.console("set_min_clients 2 --run 1")
    federation.wait_for(lambda: federation.fired(name), f"{kind} {match} to fail")
    federation.tally.fault(f"EIO at {kind}")


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        *(IN_DURABLE if LONG else QUICK),
        *(ELSEWHERE if LONG else ()),
    ],
)
def test_a_failed_sync_ends_the_process(faulty, name, kind, match):
    federation = faulty("site-1", "site-2")
    run = begin(federation)
    fail_once(federation, name, kind, match)
    federation.wait_for(lambda: federation.ended(name) or federation.over(run), f"{name} to end")
    assert federation.ended(name), "it goes on as if nothing had happened"
    assert federation.processes[name].returncode == EXIT
    assert "cannot be made durable" in federation.log_text(name) or kind == "commit"
    federation.revive(name)
    finish(federation, run)


SETTLING = [("rename", "adopting"), ("fsync", "target.json")]


@pytest.mark.faults_long
@pytest.mark.parametrize(("kind", "match"), SETTLING)
def test_a_state_that_cannot_be_settled_now_is_settled_before_the_next_task(faulty, kind, match):
    federation = faulty("site-1", "site-2")
    run = begin(federation)
    federation.arm("site-1", 1, "ENOSPC", (kind,), match)
    federation.wait_for(lambda: federation.fired("site-1"), "settling to fail")
    federation.tally.fault(f"ENOSPC at {kind}")
    finish(federation, run)


@pytest.mark.faults_long
def test_a_site_that_cannot_spool_waits_for_space(faulty):
    federation = faulty("site-1", "site-2")
    run = begin(federation)
    federation.arm("site-1", 1, "ENOSPC", ("fsync",), "-result.json")
    federation.wait_for(lambda: federation.fired("site-1"), "spooling to fail")
    federation.tally.fault("ENOSPC at fsync")
    finish(federation, run)
