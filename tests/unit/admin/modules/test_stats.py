"""`show_errors`, `reset_errors`, `show_stats`: one row per host, whatever a site says."""

import pytest

from flplatform.admin.modules.stats import MAX_ENTRIES, errors_of
from flplatform.core.control import SiteReply

ERRORS = {
    "since": 1_700_000_000.0,
    "counts": [["WARNING", "flplatform.x", 3], ["ERROR", "flplatform.y", 1]],
    "last": [[1_700_000_060.5, "ERROR", "flplatform.y", "it broke"]],
}


def test_errors_of_every_host(console, control):
    control.stats.found = {"since": 1e9, "counts": [["CRITICAL", "flplatform.z", 2]], "last": []}
    control.replies = {"a": SiteReply("ok", ERRORS)}
    answer = console("show_errors all")
    assert answer.rows["server"]["cells"]["critical"] == 2
    assert answer.rows["a"]["cells"] == {
        "warnings": 3, "errors": 1, "critical": 0,
        "since_at": "2023-11-14T22:13:20Z", "last": "it broke",
    }  # fmt: skip
    assert answer.statuses["b"] == "no_reply after 2.0 s"
    counts, last = (item for item in answer.items if item["type"] == "table")
    assert ["a", "WARNING", "flplatform.x", 3] in counts["rows"]
    assert last["rows"] == [["2023-11-14T22:14:20Z", "a", "ERROR", "it broke"]]
    assert answer.data("errors")["a"]["counts"][1] == {
        "level": "ERROR", "logger": "flplatform.y", "count": 1,
    }  # fmt: skip
    assert answer.code == 1


def test_no_errors_no_tables(console, control):
    answer = console("show_errors server")
    assert [item["type"] for item in answer.items] == ["row", "data", "done"]
    assert answer.code == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"counts": 5, "last": {}, "since": "x"},
        {"counts": [["WARNING"], 5, ["WARNING", "x", "3"], ["WARNING", "x", True]]},
        {"counts": [["WARNING", "x", -1], ["WARNING", "x", 1 << 70]], "since": float("inf")},
        {"last": [[1, 2, 3, 4], ["x"], None], "since": 1e300},
    ],
)
def test_an_answer_of_anything(console, control, body):
    control.replies = {"a": SiteReply("ok", body)}
    answer = console("show_errors client a")
    assert answer.rows["a"]["cells"] == {
        "warnings": 0, "errors": 0, "critical": 0, "since_at": None, "last": None,
    }  # fmt: skip


def test_an_answer_is_bounded():
    found = errors_of(
        {
            "counts": [["E" * 9999, "x" * 9999, 1]] * 9999,
            "last": [[1, "E", "x", "m" * 99_999]] * 9999,
        }
    )
    assert len(found["counts"]) == len(found["last"]) == MAX_ENTRIES
    assert max(len(entry["message"]) for entry in found["last"]) == 500


def test_reset(console, control):
    control.stats.found = {"since": 1e9, "counts": [["ERROR", "x", 2]], "last": []}
    control.replies = {"a": SiteReply("ok", {"reset": 4}), "b": SiteReply("ok", {"reset": "x"})}
    answer = console("reset_errors all")
    assert {name: row["cells"]["reset"] for name, row in answer.rows.items()} == {
        "server": 2, "a": 4, "b": None,
    }  # fmt: skip
    assert control.stats.errors()["counts"] == []
    assert ("amy", "reset_errors", "allowed", "") in console.records


def test_reset_needs_more_than_sight(console, control):
    assert console("reset_errors all", "max").code == 3
    assert control.asked == []


def test_stats(console, control):
    control.replies = {
        "a": SiteReply(
            "ok",
            {"uptime_s": 9.0, "tasks_done": 3, "tasks_failed": "x", "loop_lag": {"p99_s": 0.5}},
        )
    }
    answer = console("show_stats all")
    server = answer.rows["server"]["cells"]
    assert (server["sent_bytes"], server["requests"], server["appends"]) == (2005, 7, 12)
    site = answer.rows["a"]["cells"]
    assert (site["up_s"], site["tasks_done"], site["tasks_failed"]) == (9.0, 3, None)
    assert site["loop_lag_ms"] == 500.0
    calls, transfers = (item for item in answer.items if item["type"] == "table")
    assert calls["rows"] == [["GetTask ok", 3, 500.0, 60_000.0, 60_000.0]]
    assert transfers["rows"] == [["a", 1000, 2000], ["b", 0, 5]]
    assert answer.data("stats")["server"]["rpcs"]["GetTask ok"]["count"] == 3
    assert answer.data("stats")["a"]["tasks_done"] == 3
    assert answer.statuses["b"] == "no_reply after 2.0 s"


@pytest.mark.parametrize("lag", [None, 5, {}, {"p99_s": "x"}, {"p99_s": float("nan")}])
def test_numbers_that_are_none(console, control, lag):
    control.replies = {"a": SiteReply("ok", {"uptime_s": True, "loop_lag": lag})}
    cells = console("show_stats client a").rows["a"]["cells"]
    assert set(cells.values()) == {None}
