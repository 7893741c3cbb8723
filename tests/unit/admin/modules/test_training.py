import asyncio

from flplatform.admin.modules.training import Story
from flplatform.core.control import RoundMetrics
from tests.support.control import ENDED, run


def scored(number: int, score: float | None, **changes) -> RoundMetrics:
    fields = {"best": False, "sites": {}, "training": {}, "digest": "blake3:" + "7" * 64}
    return RoundMetrics(round=number, score=score, **(fields | changes))


def test_list_runs(console, control):
    control.run_views = {3: run(3, **ENDED), 4: run(4, name="lung")}
    reply = console("list_runs", "max")
    assert reply.table["columns"][:4] == ["run", "name", "status", "round"]
    assert reply.table["rows"] == [
        [
            *(3, "heart", "finished", "7/20", "amy", "2024-05-01 12:04:10"),
            *("2024-05-01 13:00:00", "all steps done"),
        ],
        [4, "lung", "training", "7/20", "amy", "2024-05-01 12:04:10", None, None],
    ]
    assert [each["run"] for each in reply.data("runs")] == [3, 4]


def test_set_run_number_is_remembered_by_the_console(console, control):
    control.run_views = {3: run(3)}
    reply = console("set_run_number 3")
    assert reply.remembered == {"run": 3}
    assert reply.text == "run 3: heart, training"
    assert console("set_run_number 4").error["code"] == "not_found"


def test_abort_asks_with_its_blast_radius(console, control):
    control.run_views = {3: run(3, accepted=("a", "c"))}
    assert console("abort 3", confirmed=False).question == (
        "abort run 3: round 7, 2 accepted updates kept, 1 site training. Continue?"
    )
    reply = console("abort")
    assert control.calls == [("abort", 3, "amy")]
    assert reply.rows["run 3"]["cells"] == {"state": "aborted"}
    assert console.records[-1][:3] == ("amy", "abort", "allowed")


def test_an_ended_run_is_not_asked_about(console, control):
    control.run_views = {3: run(3, **ENDED)}
    reply = console("abort 3", confirmed=False)
    assert reply.error["message"] == "run 3 has finished"


def test_which_run_is_meant(console, control):
    assert console("set_min_clients 2").error["message"] == "no run is active"
    control.run_views = {3: run(3), 4: run(4)}
    error = console("set_min_clients 2").error
    assert error["message"] == "several runs are active: 3, 4"
    assert error["hint"] == "name one, or set_run_number N"
    console("set_min_clients 2", run=4)
    console("set_min_clients 1 --run 3", run=4)
    assert control.calls == [("set_min_clients", 4, 2, "amy"), ("set_min_clients", 3, 1, "amy")]


def test_a_run_belongs_to_who_submitted_it(console, control):
    control.run_views = {
        3: run(3, submitter="lea", submitter_organisation="a"),
        4: run(4, submitter="amy", submitter_organisation="hub"),
    }
    assert console("abort 3", "lea").code == 0
    refused = console("abort 4", "lea")
    assert refused.error["rule"] == "role lead: train = n:submitter"
    assert refused.code == 3
    assert console("set_min_clients 1 --run 3", "oli").error["code"] == "failed_precondition"
    assert console("abort 4", "oli").code == 3
    assert [call[:2] for call in control.calls] == [("abort", 3)]
    assert console.records[-1] == ("oli", "abort", "denied", "role org_admin: train = o:submitter")


def test_wait_tells_the_story_and_ends_with_the_run(console, control):
    control.run_views = {3: run(3, answers={"a": "ok", "b": "declined: no"}, rounds=2)}
    control.rounds[3] = [scored(0, 0.5)]

    async def main():
        waiting = asyncio.create_task(console.run("wait 3"))
        await asyncio.sleep(0.05)
        control.rounds[3] = [scored(0, 0.5), scored(1, None, closed="deadline", stragglers=("b",))]
        control.update(3, status="finished", ended="now", reason="all steps done")
        return await waiting

    reply = asyncio.run(main())
    assert reply.text.splitlines() == [
        "b declined: no",
        "model 0: accuracy .500, the best so far",
        "run 3 training",
        "round 1/2 closed: deadline, without b",
        "run 3 finished: all steps done",
    ]
    assert reply.code == 0
    assert reply.data("run")["status"] == "finished"
    assert len(reply.data("run")["model_digest"]) < 20


def test_wait_ends_with_5_when_the_run_failed(console, control):
    control.run_views = {3: run(3, status="failed", ended="now", reason="no quorum")}
    assert console("wait 3").code == 5
    control.run_views = {3: run(3, status="aborted", ended="now")}
    assert console("wait 3").code == 5


def test_a_story_is_the_same_whenever_it_is_told():
    rounds = [scored(0, 0.5), scored(1, 0.7), scored(2, 0.6)]
    at_once = Story().news(run(3), rounds)
    story = Story()
    bit_by_bit = [story.news(run(3), rounds[: n + 1]) for n in range(3)]
    assert sorted(at_once) == sorted(line for lines in bit_by_bit for line in lines)
    assert at_once[:3] == [
        "model 0: accuracy .500, the best so far",
        "model 1: accuracy .700, the best so far",
        "model 2: accuracy .600",
    ]


def test_a_story_knows_what_is_better():
    lines = Story().news(run(3, metric="loss", mode="min"), [scored(0, 0.5), scored(1, 0.4)])
    assert lines[1] == "model 1: loss .400, the best so far"
