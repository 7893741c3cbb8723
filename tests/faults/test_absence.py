"""Sites that are frozen, slow or gone: what they gave counts, and nobody else waits for them."""

import shutil
import signal
import time

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.proxy import Proxy
from tests.scenarios.test_why import Talk, cause_of

pytestmark = pytest.mark.timeout(600 if LONG else 300)

LATER = pytest.mark.faults_long
BIG = 4_000_000
"""Floats of a model of 16 MB: at the pace below it is under way for ten minutes."""
SLOW_BYTES_S = 25_000
KEEPALIVE_S = 40.0
"""A ping is sent after 30 s of silence and waited for 10 s, see `flplatform.rpc.channel`."""


def calm_digest(federation, **settings) -> str:
    name = federation.job("calm", **settings)
    done = federation.console(f"submit_job {name} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return federation.final_digest(federation.run_of(name))


def counted(federation, run: int, number: int) -> list[str]:
    """Return the sites whose updates a round counts, once it has closed."""
    closed = federation.wait_event(run, ev.RoundClosed, round=number)
    return [each.site for each in closed.contributions]


@LATER
def test_a_frozen_site_keeps_what_was_accepted_and_comes_back(faulty):
    """SIGSTOP for twice the time after which it counts as dead, after its result was accepted."""
    dead_after_s = 1.5
    federation = faulty("site-1", "site-2", dead_after_s=dead_after_s)
    federation.start_all()
    let_go = federation.hold("site-2", 2)
    run = federation.submit("disturbed", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-1")
    federation.signal("site-1", signal.SIGSTOP)
    federation.tally.fault("SIGSTOP after a result")
    frozen = time.monotonic()
    console = Talk(federation)
    try:

        def dead() -> bool:
            rows = console.ask("check_status client")["rows"]
            return any(row["target"] == "site-1" and row["status"] != "ok" for row in rows)

        federation.wait_for(dead, "site-1 to count as dead", deadline_s=60)
        let_go()
        assert counted(federation, run, 2) == ["site-1", "site-2"], "it did not wait in vain"
        federation.wait_for(
            lambda: time.monotonic() - frozen > 2 * dead_after_s, "twice the time to be dead"
        )
    finally:
        federation.signal("site-1", signal.SIGCONT)
        console.close()
    federation.tally.recovered()
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    assert not federation.ended("site-1"), "the process that was frozen goes on"
    federation.check(run, calm_digest(federation, rounds=3))


@pytest.mark.faults_long
def test_a_slow_site_holds_up_nobody_else(faulty):
    """A kilobyte now and then: the quorum goes on, the console answers, the rest is fast."""
    federation = faulty("site-1", "site-2", dead_after_s=3.0)
    federation.start("server")
    with Proxy(federation.ports["fl_port"]) as proxy:
        federation.detours["site-1"] = proxy.port
        federation.redirect()
        federation.start("site-1", "site-2")
        let_go = federation.hold("site-1", 1)
        run = federation.submit(
            "disturbed", rounds=2, floats=BIG, min_clients=1, wait_after_min_s=1.0
        )
        federation.wait_event(run, ev.UpdateAccepted, round=1, site="site-2")
        proxy.change(bytes_s=SLOW_BYTES_S)
        federation.tally.fault("TCP slow")
        let_go()
        assert counted(federation, run, 1) == ["site-2"]
        assert counted(federation, run, 2) == ["site-2"]
        answer = federation.ask("check_status client")
        assert {row["target"]: row["status"] for row in answer["rows"]} == {
            "site-1": "ok",
            "site-2": "ok",
        }, "a slow site is there: its heartbeats have a connection of their own"
        proxy.change()
        proxy.cut()  # what is in the pipe of this network is not what is tested
        assert federation.wait_event(run, ev.RunEnded).status == "finished"
        federation.tally.recovered()
    federation.check(run)


@LATER
@pytest.mark.parametrize("then", ["back", "gone"])
def test_below_its_quorum_a_round_waits_and_never_closes(faulty, then):
    """Two of three are killed; they come back in the time that is left, or the run fails."""
    federation = faulty("site-1", "site-2", "site-3", dead_after_s=1.0)
    federation.start_all()
    for site in ("site-1", "site-2"):
        federation.hold(site, 2)
    settings = {"rounds": 2, "min_clients": 2, "round_deadline_s": 10.0}
    run = federation.submit("disturbed", **settings)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-3")
    for site in ("site-1", "site-2"):
        federation.kill_hard(site)
        federation.tally.fault("SIGKILL of sites below the quorum")
    if then == "gone":
        ended = federation.wait_event(run, ev.RunEnded)
        assert ended.status in ("failed", "aborted")
        assert "2" in ended.reason, ended
        federation.check(run, status=ended.status)
    else:
        federation.wait_event(run, ev.DeadlineExtended, round=2)
        for site in ("site-1", "site-2"):
            (federation.gate / f"{site}-2-train").unlink()
        federation.start("site-1", "site-2")
        federation.tally.recovered()
        assert federation.wait_event(run, ev.RunEnded).status == "finished"
        federation.check(run)
    closed = [e for e in federation.events(run) if isinstance(e, ev.RoundClosed)]
    assert all(len(each.contributions) >= 2 for each in closed), closed
    assert [each.round for each in closed] == ([1, 2] if then == "back" else [1])


@pytest.mark.parametrize(
    ("still_s", "settings"),
    [
        pytest.param(7.0, {"min_clients": 1, "wait_after_min_s": 600.0}, id="no site is dead"),
        pytest.param(
            11.0,
            {"min_clients": 2, "round_deadline_s": 10.0, "on_deadline": "abort"},
            marks=LATER,
            id="no deadline has passed",
        ),
    ],
)
def test_time_in_which_the_server_was_frozen_counts_for_nobody(faulty, still_s, settings):
    """SIGSTOP for longer than it takes to be dead, or than a round has left."""
    federation = faulty("site-1", "site-2", dead_after_s=5.0)
    federation.start_all()
    let_go = federation.hold("site-1", 1)
    run = federation.submit("disturbed", rounds=1, **settings)
    federation.wait_event(run, ev.UpdateAccepted, round=1, site="site-2")
    federation.signal("server", signal.SIGSTOP)
    federation.tally.fault("SIGSTOP of the server")
    try:
        frozen = time.monotonic()
        federation.wait_for(lambda: time.monotonic() - frozen > still_s, "a time to be dead")
    finally:
        federation.signal("server", signal.SIGCONT)
    federation.wait_for(
        lambda: "this server stood still" in federation.log_text("server"), "it to notice"
    )
    let_go()
    assert counted(federation, run, 1) == ["site-1", "site-2"]
    federation.tally.recovered()
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    assert "is dead" not in federation.log_text("server")
    federation.check(run)


@LATER
def test_both_ends_notice_that_the_other_is_frozen(faulty):
    """SIGSTOP keeps connections up: pings tell the site, heartbeats tell the server."""
    federation = faulty("site-1", "site-2", dead_after_s=3.0)
    federation.start_all()
    federation.hold("site-1", 1)
    run = federation.submit("disturbed", rounds=1)
    federation.wait_event(run, ev.UpdateAccepted, round=1, site="site-2")
    federation.signal("server", signal.SIGSTOP)
    federation.tally.fault("SIGSTOP of the server")
    before = len(federation.log_text("site-1"))
    try:
        federation.wait_for(
            lambda: "no connection" in federation.log_text("site-1")[before:],
            "the site to notice",
            deadline_s=2 * KEEPALIVE_S,
        )
    finally:
        federation.signal("server", signal.SIGCONT)
    federation.signal("site-1", signal.SIGSTOP)
    federation.tally.fault("SIGSTOP of a site")
    console = Talk(federation)
    try:
        console.until(
            lambda found: cause_of(found, "site-1") in ("away", "silent"), "its absence", str(run)
        )
    finally:
        federation.signal("site-1", signal.SIGCONT)
        console.close()
    (federation.gate / "site-1-1-train").unlink()
    federation.tally.recovered()
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    federation.check(run)


@pytest.mark.faults_long
def test_a_site_that_has_lost_its_state_takes_part_again(faulty):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    hold = federation.hold("site-1", 2)
    last = federation.hold("site-2", 4)
    run = federation.submit("disturbed", rounds=6, min_clients=1, wait_after_min_s=60.0)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    federation.kill_hard("site-1")
    shutil.rmtree(federation.kit("site-1") / "state")
    federation.tally.fault("a site's state lost")
    hold()
    federation.start("site-1")
    lacks = federation.wait_event(run, ev.TaskFailed, site="site-1")
    assert f"does not have run {run}" in lacks.error
    console = Talk(federation)
    try:
        advice = [console.why(words)["can"][:2] for words in ("site-1", str(run))]
    finally:
        console.close()
    remedy = [f"abort client site-1 --run {run}", f"start client site-1 --run {run}"]
    assert advice == [remedy, remedy]
    for line in remedy:
        done = federation.console(line)
        assert done.returncode == 0, done.stdout + done.stderr
    federation.tally.recovered()
    last()
    federation.wait_event(run, ev.UpdateAccepted, round=6, site="site-1")
    federation.wait_event(run, ev.RunEnded)
    federation.check(run)
