from dataclasses import replace

import pytest

from flplatform.core.control import SiteReply
from tests.support.control import ENDED, run, site
from tests.unit.admin.conftest import SIGNED


def said(**report) -> SiteReply:
    return SiteReply("ok", {"runs": [report] if report else [], "isolation": "sandbox"})


@pytest.fixture
def busy(control):
    control.run_views[3] = run(3, targets=("a", "b", "c"), waiting=("b",))
    control.site_views = [site("a"), site("b"), site("c", certificate_days=27.0)]
    control.run_views[3] = run(
        3,
        targets=("a", "b", "c"),
        answers={"a": "ok", "b": "ok", "c": "declined: policy byoc: no foreign code"},
    )
    control.replies = {
        "a": said(run=3, round=7, phase="uploading", since_s=0.3),
        "b": said(run=3, round=7, phase="training", since_s=184.0),
        "c": said(),
    }
    return control


def test_every_target_has_a_row_with_what_it_does(console, busy):
    reply = console("check_status all")
    assert reply.rows["server"]["cells"] == {
        "state": "serving",
        "run": 3,
        "round": 7,
        "round_of": 20,
        "phase": "training: 1 of 2 updates",
        "since_s": None,
        "last_seen_s": None,
        "certificate_days": 341.2,
    }
    assert reply.rows["a"]["cells"] == {
        "state": "training",
        "run": 3,
        "round": 7,
        "round_of": None,
        "phase": "uploading",
        "since_s": 0.3,
        "last_seen_s": 0.4,
        "certificate_days": 341.2,
    }
    assert reply.rows["b"]["cells"]["since_s"] == 184.0
    assert reply.rows["c"]["cells"]["state"] == "idle"
    assert reply.rows["c"]["cells"]["phase"] == "declined run 3"
    assert reply.rows["c"]["cells"]["certificate_days"] == 27.0
    assert reply.code == 0
    assert busy.asked == [(("a", "b", "c"), "check_status", SIGNED)]


def test_a_server_that_can_decide_nothing_says_why(console, busy, monkeypatch):
    trouble = "PostgreSQL db.example.org is away since 2026-01-02T03:04:05Z: timeout"
    view = replace(busy.server(), state="no database", trouble=trouble)
    monkeypatch.setattr(busy, "server", lambda: view)
    reply = console("check_status server")
    assert reply.statuses["server"] == f"error {trouble}"
    assert reply.rows["server"]["cells"]["state"] == "no database"
    assert reply.code == 1


def test_two_processes_with_one_kit_are_told(console, busy):
    busy.site_views[1] = replace(busy.site_views[1], contested=True)
    reply = console("check_status all")
    text = "registers again and again: do two processes use its kit?"
    assert reply.statuses["b"] == f"error {text}"
    assert reply.statuses["a"] == "ok"


def test_several_processes_of_a_run_are_shown(console, busy):
    busy.replies["a"] = said(run=3, round=7, phase="train", since_s=0.3, processes=4)
    cells = console("check_status client a").rows["a"]["cells"]
    assert cells["phase"] == "train, 4 processes"
    busy.replies["a"] = said(run=3, round=7, phase="train", since_s=0.3, processes=1)
    assert console("check_status client a").rows["a"]["cells"]["phase"] == "train"


def test_the_data_has_numbers_and_no_whole_digest(console, busy):
    data = console("check_status all").data("runs")
    assert data[0]["waiting"] == ("b",)
    assert data[0]["model_digest"] == "blake3:555555555555"


def test_a_silent_site_keeps_its_last_heartbeat_in_sight(console, busy):
    del busy.replies["b"]
    busy.site_views[1] = site("b", runs=((3, 6, "training", 40.0),), last_seen_s=43.0)
    row = console("check_status client b").rows["b"]
    assert (row["status"], row["detail"]) == ("no_reply", "after 2.0 s")
    assert (row["cells"]["round"], row["cells"]["since_s"]) == (6, 40.0)
    assert row["cells"]["last_seen_s"] == 43.0


def test_a_site_that_refuses_says_by_which_rule(console, busy):
    busy.replies["a"] = SiteReply("refused", message="amy may not", rule="policy commands: view")
    reply = console("check_status client a b")
    assert reply.statuses["a"] == "refused rule policy commands: view: amy may not"
    assert reply.statuses["b"] == "ok"
    assert reply.code == 1


def test_sites_that_are_not_there_are_named_too(console, busy):
    busy.site_views = [site("a"), site("b", state="expected", last_seen_s=None)]
    reply = console("check_status client")
    assert reply.statuses == {
        "a": "ok",
        "b": "error not back yet since the server's restart",
        "c": "error has never registered",
    }
    assert reply.rows["b"]["cells"]["state"] == "expected"
    assert reply.rows["c"]["cells"]["state"] == "away"
    assert busy.asked[0][0] == ("a",)


def test_an_unknown_site_is_answered_with_the_nearest(console, control):
    control.site_views = [site("cleveland")]
    reply = console("check_status client clevland")
    assert reply.statuses == {"clevland": "unknown site (did you mean cleveland?)"}
    assert reply.code == 1


def test_a_disabled_site_says_so(console, control):
    control.site_views = [site("a", state="disabled")]
    control.replies["a"] = said()
    assert console("check_status client a").rows["a"]["cells"]["state"] == "disabled"


def test_without_a_run_the_server_says_so(console):
    cells = console("check_status server").rows["server"]["cells"]
    assert (cells["run"], cells["phase"]) == (None, "no run active")


def test_with_several_runs_the_session_chooses(console, control):
    control.run_views = {3: run(3), 4: run(4, status="deploying", round=0, accepted=())}
    assert console("check_status server").rows["server"]["cells"]["phase"] == "2 runs active"
    cells = console("check_status server", run=4).rows["server"]["cells"]
    assert (cells["run"], cells["phase"]) == (4, "deploying: 0 of 1 answers")


def test_the_sessions_run_may_have_ended_or_not_exist(console, control):
    control.run_views = {3: run(3, **ENDED)}
    assert console("check_status server", run=3).rows["server"]["cells"]["phase"] == "finished"
    assert console("check_status server", run=9).rows["server"]["cells"]["run"] is None


def test_nonsense_from_a_site_is_left_out(console, control):
    control.replies["a"] = SiteReply(
        "ok", {"runs": ["x", {"run": 3}, {"run": 1, "round": "?", "phase": 1, "since_s": 2}]}
    )
    assert console("check_status client a").rows["a"]["cells"]["state"] == "idle"


@pytest.mark.parametrize(
    ("state", "seen", "said"),
    [
        ("stopped", 180.0, "stopped 3 min ago"),
        ("removed", 2.0, "removed 2.0 s ago"),
        ("away", 64.0, "lost: last heard of 64.0 s ago"),
        ("away", None, "not seen since the server's start"),
    ],
)
def test_why_a_site_is_not_there(console, control, state, seen, said):
    control.site_views = [site("a", state=state, last_seen_s=seen, certificate_days=None)]
    reply = console("check_status client a")
    assert reply.statuses == {"a": f"error {said}"}
    assert reply.rows["a"]["cells"]["state"] == state
    assert control.asked == [((), "check_status", SIGNED)]


def test_rows_come_in_the_order_of_the_targets(console, busy):
    reply = console("check_status client c nobody a")
    assert list(reply.rows) == ["c", "nobody", "a"]


def test_a_refusal_says_its_rule_once(console, busy):
    rule = "role member: view is not granted"
    busy.replies["a"] = SiteReply("refused", message=f"refused by {rule}", rule=rule)
    assert console("check_status client a").statuses["a"] == f"refused refused by {rule}"
