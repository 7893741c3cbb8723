from dataclasses import replace

import pytest

from flplatform.core.control import RoundMetrics, SiteReply
from tests.support.control import ENDED, run, site

TRIO = {
    "targets": ("a", "b", "c"),
    "answers": {"a": "ok", "b": "ok", "c": "ok"},
    "accepted": ("a",),
    "waiting": ("b", "c"),
}


@pytest.fixture
def trio(control):
    control.site_views = [site("a"), site("b"), site("c")]
    control.run_views = {3: run(3, **TRIO)}
    return control


# ---- abort --------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["abort", "abort all", "abort server", "abort client"])
def test_abort_ends_the_run_and_asks_before(console, trio, line):
    question = "abort run 3: round 7, 1 accepted update kept, 2 sites training. Continue?"
    assert console(line, confirmed=False).question == question
    reply = console(line)
    assert trio.calls == [("abort", 3, "amy")]
    assert reply.rows["run 3"]["cells"] == {"state": "aborted"}
    assert reply.data("run")["status"] == "aborted"
    assert console.records[-1][:3] == ("amy", "abort", "allowed")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"phase": "validate", "status": "validating", "results": 5, "waiting": ("b",)},
            "round 7, 5 accepted results kept, 1 site validating",
        ),
        ({"phase": "", "waiting": ()}, "round 7 of 20 done, no task is open"),
        ({"status": "deploying", "phase": ""}, "deploying, 1 of 3 sites accepted"),
    ],
)
def test_the_question_counts_what_is_open(console, trio, changes, what):
    trio.run_views = {3: run(3, **TRIO | changes)}
    assert console("abort", confirmed=False).question == f"abort run 3: {what}. Continue?"


def test_abort_at_some_sites(console, trio):
    asked = console("abort client c --run 3", confirmed=False)
    assert asked.question == (
        "end run 3 at c: round 7, 1 accepted update kept, 2 sites training; 2 sites left. Continue?"
    )
    reply = console("abort client c")
    assert trio.lifecycle.calls == [("withdraw", 3, ("c",), "amy")]
    assert reply.rows["c"]["cells"] == {"run": 3, "state": "withdrawn"}
    assert (trio.calls, reply.code) == ([], 0)


def test_the_question_says_when_the_quorum_is_lost(console, trio):
    question = console("abort client b c", confirmed=False).question
    assert "quorum 2 is lost then and the run may fail. Continue?" in question
    trio.run_views = {3: run(3, **TRIO | {"phase": "", "waiting": ()})}
    question = console("abort client b c", confirmed=False).question
    assert "quorum 2 cannot be reached then and the run will fail" in question
    question = console("abort client a b c", confirmed=False).question
    assert question.startswith("abort run 3: ")


def test_a_run_that_fails_for_want_of_sites_is_told(console, trio):
    trio.lifecycle.on_withdraw = lambda: trio.update(3, **ENDED | {"status": "failed"})
    reply = console("abort client b c")
    assert reply.text == "run 3 failed: all steps done"
    assert set(reply.statuses.values()) == {"ok"}


def test_each_site_without_a_part_has_its_row(console, trio):
    trio.site_views.append(site("d"))
    trio.update(3, answers={"a": "ok", "b": "withdrawn by oli", "c": "declined: busy: no"})
    reply = console("abort client a b c d aa")
    assert reply.statuses == {
        "a": "ok",
        "b": "error has no part in run 3: withdrawn by oli",
        "c": "error has no part in run 3: declined: busy: no",
        "d": "error is no target of run 3",
        "aa": "unknown site (did you mean a?)",
    }
    assert reply.code == 1
    assert console("abort client d", confirmed=False).question == ""


def test_the_old_usage_is_explained(console, trio):
    reply = console("abort 3")
    assert "to end run 3: abort all --run 3" in reply.error["message"]
    assert reply.code == 2
    assert "did you mean client a?" in console("abort a").error["message"]


@pytest.mark.parametrize(
    ("status", "state"), [("finished", "has finished"), ("aborted", "was aborted: all steps done")]
)
@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("abort --run 3", "abort"),
        ("abort_task a --run 3", "abort_task"),
        ("set_min_clients 1 --run 3", "set_min_clients"),
    ],
)
def test_an_illegal_state_is_explained(console, control, line, command, status, state):
    control.run_views = {3: run(3, **ENDED | {"status": status})}
    for confirmed in (False, True):
        error = console(line, confirmed=confirmed).error
        assert error["message"] == (
            f"run 3 {state}; {command} is legal while a run is deploying, training or validating"
        )
        assert error["rule"] == "run_active"


def test_who_may_abort(console, trio):
    trio.update(3, submitter="lea", submitter_organisation="a")
    assert console("abort client b", "lea").code == 0
    trio.update(3, submitter="amy", submitter_organisation="hub")
    assert console("abort client b", "lea").error["rule"] == "role lead: train = n:submitter"
    assert console("abort client a", "oli").code == 3


# ---- abort_task ---------------------------------------------------------------------------------


def test_abort_task(console, trio):
    trio.lifecycle.tasks = {"b": ("3/7/train/b",)}
    reply = console("abort_task b a nobody")
    assert reply.rows["b"]["cells"] == {"run": 3, "given_up": "3/7/train/b"}
    assert reply.statuses["a"] == "error a has no open task in run 3"
    assert reply.statuses["nobody"] == "unknown site"
    assert reply.data("given_up") == {"b": ["3/7/train/b"]}
    assert trio.lifecycle.calls == [("abort_task", 3, "b", "amy")]


def test_abort_task_asks_only_when_the_quorum_is_lost(console, trio):
    assert console("abort_task b", confirmed=False).question == ""
    assert console("abort_task b c", confirmed=False).question == (
        "abort the tasks of b, c: round 7, 1 accepted update kept, 2 sites training; "
        "quorum 2 is lost then and the run may fail. Continue?"
    )


def test_the_right_to_abort_a_task_is_the_site_s(console, trio):
    trio.lifecycle.tasks = {"a": ("3/7/train/a",), "b": ("3/7/train/b",)}
    reply = console("abort_task a b", "oli")  # an org_admin of a
    assert reply.statuses["a"] == "ok"
    assert reply.statuses["b"].startswith("refused rule role org_admin: operate")
    assert console("abort_task a", "max").code == 3


# ---- enable and disable -------------------------------------------------------------------------


def test_disable_and_enable(console, trio):
    busy = site("a", runs=((3, 7, "training", 1.0),))
    trio.site_views = [busy, site("b"), site("c")]
    asked = console("disable_client a", confirmed=False)
    assert asked.question == ("disable a until enable_client: a works on run 3 round 7. Continue?")
    asked = console("disable_client b c", confirmed=False)
    assert asked.question == (
        "disable b, c until enable_client: no site among them is training; "
        "run 3: quorum 2 is lost then and the run may fail. Continue?"
    )
    assert console("disable_client a").rows["a"]["cells"] == {"state": "disabled"}
    assert console("disable_client a").rows["a"]["cells"] == {"state": "disabled already"}
    trio.site_views[0] = replace(busy, state="disabled")
    assert console("disable_client a", confirmed=False).question == ""
    assert console("enable_client a x").statuses == {"a": "ok", "x": "unknown site"}
    assert console("disable_client a b", "oli").statuses["b"].startswith("refused")


# ---- delete_run_number --------------------------------------------------------------------------


def test_delete_run_number_has_a_row_for_each_host(console, control):
    control.site_views = [site("a"), site("b", state="away", certificate_days=None)]
    targets = {"targets": ("a", "b", "c"), "answers": {"a": "ok", "b": "ok", "c": "ok"}}
    control.run_views = {3: run(3, **ENDED | targets)}
    control.replies = {"a": SiteReply("ok", {"files": 2, "bytes": 1200})}
    control.rounds[3] = [
        RoundMetrics(round=n, score=None, best=False, sites={}, training={}, digest="")
        for n in range(3)
    ]
    assert console("delete_run_number 3", confirmed=False).question == (
        "delete run 3 (heart, finished): 3 global models, its updates and metrics, "
        "its logs at 3 sites; its number is not used again. Continue?"
    )
    reply = console("delete_run_number 3")
    assert control.lifecycle.calls == [("delete", 3, "amy")]
    assert [item["target"] for item in reply.items if item["type"] == "row"] == [
        *("server", "a", "b", "c")
    ]
    assert reply.rows["a"]["cells"] == {"run": 3, "freed": "1.2 kB"}
    assert reply.statuses["b"].startswith("error lost: last heard of")
    assert reply.statuses["b"].endswith("its logs stay")
    assert reply.statuses["c"] == "error has never registered: its logs stay"
    assert reply.data("deleted") == {"run": 3, "cleaned": ["a"], "left": ["b", "c"]}
    assert [topic for _, topic, _ in control.asked] == ["delete_run_number"]


def test_a_run_at_work_is_not_deleted(console, trio):
    error = console("delete_run_number 3", confirmed=False).error
    assert error["message"].startswith("run 3 is training; delete_run_number is legal once a run")
    assert error["hint"] == "abort all --run 3"
    assert console("delete_run_number 3").error["rule"] == "run_ended"
    assert trio.lifecycle.calls == []


def test_a_prepared_run_has_no_sites_to_clean(console, control):
    control.run_views = {5: run(5, status="prepared", name="", targets=("a",), answers={})}
    assert console("delete_run_number 5", confirmed=False).question == (
        "delete run 5 (prepared): its number is not used again. Continue?"
    )
    assert console("delete_run_number 5").statuses == {"server": "ok"}
    assert control.asked == []
