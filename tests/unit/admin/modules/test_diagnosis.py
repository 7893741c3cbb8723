"""`why`: the text, the rows of the sites, and who may ask."""

import json
from dataclasses import replace

import pytest

from flplatform.core.control import SiteReply
from flplatform.core.diagnosis import Coming, Diagnosis, Line, Part, Waiting
from flplatform.hci.grammar import parse
from tests.support.control import run, site

WHY = Diagnosis(
    headline="run 3 waits in round 7 for b, since 14.1 s; quorum 3 not reached (2 accepted)",
    cause="training",
    run=3,
    waits_for=(Waiting("b", "slow", "b: train since 31.0 s", 31.0),),
    lines=(Line("2024-05-01T12:04:10.000Z", "b took task 3/7/train/b"), Line("", "by itself")),
    next=(Coming("2024-05-01T12:06:09.000Z", 120.0, "deadline: extended once by 120 s"),),
    can=("set_min_clients 2 --run 3", "abort all --run 3"),
    ask=("b",),
)


@pytest.fixture
def why(control):
    control.run_views = {3: run(3)}
    control.diagnosis.answers = {3: WHY}
    return control


def test_one_screen(console, why):
    why.replies["b"] = SiteReply(
        "ok",
        {
            "runs": [{"run": 3, "round": 7, "phase": "train", "since_s": 31.5}],
            "errors": [{"time": "2024-05-01T12:04:11.000Z", "text": "loss is NaN"}] * 9,
            "disk_free_bytes": 10**9,
        },
    )
    reply = console("why 3")
    assert reply.text.splitlines()[:6] == [
        "run 3 waits in round 7 for b, since 14.1 s; quorum 3 not reached (2 accepted)",
        "  12:04:10  b took task 3/7/train/b",
        "            by itself",
        "  waits for b: train since 31.0 s",
        "  next      12:06:09 in 2 min: deadline: extended once by 120 s",
        "  you can   set_min_clients 2 --run 3   ·   abort all --run 3",
    ]
    cells = reply.rows["b"]["cells"]
    assert (cells["phase"], cells["since_s"], cells["disk_free_bytes"]) == ("train", 31.5, 10**9)
    assert reply.text.count("loss is NaN") == 5
    data = reply.data("why")
    assert (data["cause"], data["waits_for"][0]["since_s"]) == ("training", 31.0)
    assert data["sites"]["b"]["status"] == "ok"
    json.dumps(data)
    assert reply.code == 0


def test_who_is_waited_for_is_named_first_and_once(console, why):
    waits = {
        "b: train since 31.0 s": "b: train since 31.0 s",
        "b is silent since 31.0 s": "b: it is silent since 31.0 s",
        "the server has no room for what b sends": "b: the server has no room for what b sends",
    }
    for text, said in waits.items():
        item = Waiting("b", "silent", text)
        why.diagnosis.answers = {3: replace(WHY, waits_for=(item,))}
        assert f"\n  waits for {said}\n" in console("why 3").text
        why.diagnosis.answers = {3: replace(WHY, headline=f"run 3: {said}", waits_for=(item,))}
        assert "waits for" not in console("why 3").text


def test_the_current_run_is_meant(console, why):
    assert console("why").text.startswith("run 3 waits")
    assert console("why", run=3).text.startswith("run 3 waits")


def test_a_silent_site_and_one_that_refuses_have_their_rows(console, why):
    silent = console("why 3")
    assert silent.statuses == {"b": "no_reply after 2.0 s"}
    assert (silent.rows["b"]["cells"], silent.code) == ({}, 0)
    why.replies["b"] = SiteReply("refused", rule="policy commands: view = none")
    assert console("why 3").statuses == {"b": "refused rule policy commands: view = none"}


def test_what_a_site_answers_is_not_trusted(console, why):
    for body in (
        {"runs": "x", "errors": "y"},
        {"runs": [7], "errors": [7, {"text": 5}]},
        {"runs": [{"phase": "p" * 900, "since_s": "x", "run": True}], "errors": {}},
    ):
        why.replies["b"] = SiteReply("ok", body)
        cells = console("why 3").rows["b"]["cells"]
        assert len(cells["phase"]) <= 60
        assert cells["since_s"] is None


def test_a_round_has_a_table(console, why):
    parts = tuple(Part(f"s{number}", "accepted", 1.5) for number in range(25))
    why.diagnosis.answers[3, 7] = Diagnosis("round 7 closed", "round_closed", 3, parts=parts)
    reply = console("why 3 7")
    assert reply.table["columns"] == ["site", "outcome", "took_s", "reason"]
    assert reply.table["rows"][0] == ["s0", "accepted", 1.5, None]
    assert len(reply.table["rows"]) == 20
    assert "… and 5 sites more" in reply.text
    assert len(reply.data("why")["parts"]) == 25


def test_a_site(console, why):
    why.diagnosis.answers["a"] = Diagnosis("a is connected and idle", "idle", ask=("a",))
    why.replies["a"] = SiteReply("ok", {"runs": [], "errors": []})
    reply = console("why a")
    assert reply.text == "a is connected and idle"
    assert reply.rows["a"]["cells"]["phase"] == "idle"
    assert "runs have" not in reply.text
    assert console("why a 3").error["code"] == "invalid_argument"
    assert console("why 0").error["code"] == "invalid_argument"


def test_a_site_that_never_registered_and_one_like_it(console, why):
    why.site_views.append(site("hospital-a"))
    reply = console("why hospital-b")
    assert reply.text == "hospital-b has never registered with this server"
    assert reply.statuses == {"hospital-b": "unknown site (did you mean hospital-a?)"}
    assert reply.code == 1


def test_the_policy_is_asked_about_the_run_or_the_site(console, why):
    console.policy.write_text(
        "roles:\n  member: {view: ['n:submitter']}\n  lead: {view: ['o:site']}\n"
    )
    console.rights.reload()
    assert console("why 3", "max").code == 3
    assert console("why a", "lea").code == 0
    assert console("why b", "lea").code == 3


WORDS = (
    "set_min_clients 2 --run 7", "abort all --run 7", "logs -f 7 b", "lineage 7 3",
    "show_metrics 7", "download_model 7 last", "remove_client b", "why 7",
    "enable_client b", "abort_task b --run 7",
)  # fmt: skip
"""As `server.diagnosis` writes them."""


def test_what_one_can_do_can_be_typed(console, why):
    known = {view.name for view in console.register.views()}
    for name, *words in (line.split() for line in WORDS):
        if name in known:
            assert parse(words, console.register.find(name))
    why.diagnosis.answers[3] = replace(WHY, can=("no_such_verb 3", *WORDS))
    offered = list(console("why 3").data("why")["can"])
    assert offered == [line for line in WORDS if line.split()[0] in known]


def test_taskname(console, control):
    assert console("taskname").text == "project heart; no run yet"
    control.run_views = {3: run(3)}
    reply = console("taskname")
    assert reply.text == "project heart, job heart (run 3, training)"
    assert reply.data("taskname") == {"project": "heart", "job": "heart", "run": 3}
    control.run_views[4] = run(4)
    assert "several runs are active" in console("taskname").error["message"]
