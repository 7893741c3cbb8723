"""Wall clocks that are off or jump: orders are refused by name, running work goes on."""

import re

import pytest

from flplatform.core import events as ev

pytestmark = pytest.mark.timeout(300)

TWO_DAYS = 2 * 86400.0


@pytest.mark.faults_long
def test_an_order_beyond_the_skew_is_refused_and_names_both_clocks(faulty):
    federation = faulty("site-1", "site-2")
    federation.start_all()
    for shift in (3600.0, -3600.0):
        federation.shift_clock("site-1", shift)
        federation.tally.fault("clock off")
        answer = federation.ask("sys_info client")
        rows = {row["target"]: row for row in answer["rows"]}
        assert rows["site-2"]["status"] == "ok", answer
        assert rows["site-1"]["status"] == "refused", answer
        assert len(re.findall(r"\d\d:\d\d:\d\d", rows["site-1"]["detail"])) >= 2, rows["site-1"]
    federation.shift_clock("site-1", 0)
    answer = federation.ask("sys_info client")
    assert {row["status"] for row in answer["rows"]} == {"ok"}
    federation.tally.recovered()


LATER = pytest.mark.faults_long
BOTH = ("server", "site-1")


@pytest.mark.parametrize(
    ("shift", "who"),
    [
        (TWO_DAYS, BOTH),
        *(
            pytest.param(shift, who, marks=LATER)
            for shift in (TWO_DAYS, -TWO_DAYS)
            for who in (BOTH, BOTH[:1], BOTH[1:])
            if (shift, who) != (TWO_DAYS, BOTH)
        ),
    ],
)
def test_a_jump_of_the_wall_clock_disturbs_no_run(faulty, shift, who):
    federation = faulty("site-1", "site-2", dead_after_s=30.0)
    federation.start_all()
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=4, round_deadline_s=300.0)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    for name in who:
        federation.shift_clock(name, shift)
        federation.tally.fault("clock jumps")
    let_go()

    def told() -> str:
        return federation.log_text("server") + federation.log_text("site-1")

    # Back before the revocation lists were issued nobody is let in, and the reason is told.
    federation.wait_for(
        lambda: federation.over(run) or (shift < 0 and "not yet valid" in told()),
        "the end of the run, or what is wrong with the clock",
    )
    for name in who:
        federation.shift_clock(name, 0)
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    assert not [e for e in federation.events(run) if isinstance(e, ev.DeadlineExtended)]
    federation.check_against_calm(run, rounds=4)
