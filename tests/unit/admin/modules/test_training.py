import asyncio

from flplatform.admin.modules.training import Story
from flplatform.core.control import RoundMetrics
from tests.support.control import ENDED, run
from tests.unit.admin.conftest import session_of


def scored(number: int, score: float | None, **changes) -> RoundMetrics:
    fields = {"best": False, "sites": {}, "training": {}, "digest": "blake3:" + "7" * 64}
    return RoundMetrics(round=number, score=score, **(fields | changes))


def test_list_runs(console, control):
    control.run_views = {3: run(3, **ENDED), 4: run(4, name="lung")}
    reply = console("list_runs", "max")
    assert reply.table["columns"][:4] == ["run", "name", "status", "round"]
    assert reply.table["rows"] == [
        [
            *(3, "heart", "finished", 7, 20, "amy", "2024-05-01T12:04:10.123Z"),
            *("2024-05-01T13:00:00.000Z", "all steps done"),
        ],
        [4, "lung", "training", 7, 20, "amy", "2024-05-01T12:04:10.123Z", None, None],
    ]
    assert [each["run"] for each in reply.data("runs")] == [3, 4]


def test_list_runs_can_be_narrowed(console, control):
    control.run_views = {
        3: run(3, **ENDED),
        4: run(4, submitter="lea", submitter_organisation="a"),
        5: run(5),
    }
    control.lifecycle.views = [run(2, status="deleted", reason="finished; deleted by oli")]

    def listed(line, user="amy"):
        return [each["run"] for each in console(line, user).data("runs")]

    assert listed("list_runs") == [3, 4, 5]
    assert listed("list_runs --status training") == [4, 5]
    assert listed("list_runs --user lea") == [4]
    assert listed("list_runs --last 2") == [4, 5]
    assert listed("list_runs --all") == [2, 3, 4, 5]
    assert listed("list_runs --status deleted --last 9") == [2]
    assert console("list_runs --user nobody").text == "no such run"
    assert "not one of prepared, deploying" in console("list_runs --status odd").error["message"]


def test_list_runs_shows_what_one_may_see(console, control):
    control.run_views = {
        3: run(3),
        4: run(4, submitter="lea", submitter_organisation="a"),
        5: run(5, submitter="max", submitter_organisation="a"),
    }
    console.policy.write_text("roles: {lead: {view: n:submitter}, member: {view: o:submitter}}")
    console.rights.reload()
    assert [each["run"] for each in console("list_runs", "lea").data("runs")] == [4]
    assert [each["run"] for each in console("list_runs", "max").data("runs")] == [4, 5]


def test_set_timeout_is_the_session_s(console, control):
    session = session_of("amy")
    assert console("set_timeout 0.05").code == 2
    assert "at most 300" in console("set_timeout 301").error["message"]
    reply = console("set_timeout 10", session=session)
    assert reply.data("timeout_s") == 10
    assert session.reply_timeout_s == 10
    rows = console("check_status all", session=session).rows
    assert rows["a"]["detail"] == "after 10.0 s"
    assert console("check_status all").rows["a"]["detail"] == "after 2.0 s"


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
    assert console("abort --run 3", "lea").code == 0
    refused = console("abort --run 4", "lea")
    assert refused.error["rule"] == "role lead: train = n:submitter"
    assert refused.code == 3
    assert console("set_min_clients 1 --run 3", "oli").error["code"] == "failed_precondition"
    assert console("abort --run 4", "oli").code == 3
    assert [call[:2] for call in control.calls] == [("abort", 3)]
    assert console.records[-1] == ("oli", "abort", "denied", "role org_admin: train = o:submitter")


def test_wait_tells_the_story_and_ends_with_the_run(console, control):
    control.run_views = {3: run(3, answers={"a": "ok", "b": "declined: no"}, rounds=2)}
    control.rounds[3] = [scored(0, 0.5)]

    async def main():
        waiting = asyncio.create_task(console.run("wait 3"))
        while not control.changed._waiters:
            await asyncio.sleep(0.001)
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
