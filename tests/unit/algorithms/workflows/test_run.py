"""Deploying, what results are accepted, and how a run ends."""

import pytest

from flplatform.algorithms.workflows import classify, decide, pending, replay
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from flplatform.core.events import (
    DeployWaitOver,
    QuorumSet,
    RunEnded,
    RunNumbered,
    SiteAnswered,
    StepStarted,
    TaskFailed,
    UpdateAccepted,
)
from flplatform.core.messages import ModelRef, TaskFailure, TaskId, TaskResult
from flplatform.core.workflow import AnswerArrived, FailureArrived, ResultArrived, TimerFired
from tests.support.workflows import INITIAL, RUN, Played, digest, training, validating

# ---- deploying ----------------------------------------------------------------------------------


def test_a_new_run_is_carried_to_every_target():
    run = Played("abc", deploy_wait_s=60)
    assert run.status == "deploying"
    assert run.deploys == ["a", "b", "c"]
    assert run.wakes == {"deploy": 60}


def test_an_answer_is_kept_with_its_isolation_and_ends_the_delivery():
    run = Played("abc")
    run.give(AnswerArrived("a", True, isolation="sandbox"))
    assert run.last(SiteAnswered).isolation == "sandbox"
    assert run.deploys == ["b", "c"]


def test_the_first_step_starts_when_all_have_answered():
    run = Played("abc").accept("a", "b")
    assert run.status == "deploying"
    run.accept("c")
    assert run.last(StepStarted) == StepStarted(index=0, step="scatter_gather")
    assert run.status == "training"


def test_a_declining_target_has_answered_too():
    run = Played("abc").accept("a", "b")
    run.decline("c")
    assert run.offered == ["1/train/a", "1/train/b"]


def test_a_disabled_target_is_not_waited_for_while_there_is_a_quorum():
    run = Played("abc").accept("a", "b")
    run.disable("c")
    assert run.offered == ["1/train/a", "1/train/b"]
    assert run.deploys == ["c"], "it may take part when it is enabled"


def test_a_disabled_target_of_a_quorum_of_all_is_waited_for():
    run = Played("abc", min_clients=3).accept("a", "b")
    run.disable("c")
    assert run.status == "deploying"
    run.roster_is("abc")
    run.accept("c")
    assert run.offered == ["1/train/a", "1/train/b", "1/train/c"]


def test_silent_targets_are_waited_for_only_so_long():
    run = Played("abc").accept("a", "b")
    assert run.fire("deploy")[0] == DeployWaitOver()
    assert run.offered == ["1/train/a", "1/train/b"]
    assert run.deploys == ["c"], "it may still come later"


def test_after_the_wait_the_first_quorum_starts_the_run():
    run = Played("abc", quorum_wait_s=900)
    run.fire("deploy")
    assert run.wakes == {"quorum/1": 900}
    run.accept("b")
    assert run.status == "deploying"
    run.accept("a")
    assert run.offered == ["1/train/a", "1/train/b"]


def test_sites_that_accepted_and_went_do_not_make_a_quorum():
    run = Played("ab")
    run.go("b")
    run.accept()
    assert run.status == "deploying"
    run.come("b")
    assert run.status == "training"


def test_without_a_quorum_the_run_fails_at_last_and_says_so():
    run = Played("abc", quorum_wait_s=900).accept("a")
    run.fire("deploy")
    run.fire("quorum")
    assert run.last(RunEnded) == RunEnded(
        status="failed", reason="only 1 of 2 needed sites were there for 900 s (quorum_wait_s)"
    )


def test_the_wait_for_a_quorum_begins_after_that_for_answers():
    run = Played("abc", quorum_wait_s=1, deploy_wait_s=60).accept("a", "b")
    assert run.wakes == {"deploy": 60}
    run.go("b")
    run.fire("deploy")
    assert run.wakes == {"quorum/1": 1}, "it must not have fired before it was needed"


def test_declines_that_rule_a_quorum_out_end_the_run_with_every_rule():
    run = Played("abc")
    run.decline("c", "accept_jobs", "not on weekends")
    run.accept("a")
    assert not run.state.ended
    run.decline("b", "", "disk full")
    assert run.last(RunEnded).status == "failed"
    assert run.last(RunEnded).reason == (
        "quorum 2 of 3 cannot be reached: b declined (error: disk full); "
        "c declined (accept_jobs: not on weekends)"
    )


def test_only_the_first_answer_of_a_site_counts():
    run = Played("abc").accept("a")
    assert run.decline("a") == ()
    assert run.state.deployed == {"a"}


def test_the_answer_of_a_stranger_is_ignored():
    assert Played("abc").give(AnswerArrived("x", True)) == ()


def test_an_answer_after_the_end_is_ignored():
    run = Played("abc")
    run.abort()
    assert run.decline("a") == ()


# ---- results ------------------------------------------------------------------------------------


def test_an_update_is_kept_with_all_it_says():
    run = training("ab", min_clients=2)
    run.update("a", model="new", examples=30, accuracy=0.5, tested=20, loss=0.25)
    assert run.last(UpdateAccepted) == UpdateAccepted(
        task_id=f"{RUN}/1/train/a",
        site="a",
        round=1,
        digest=digest("new"),
        size=100,
        examples=30,
        metrics={"loss": 0.25},
        received={"accuracy": 0.5},
        received_examples=20,
    )
    assert run.offered == ["1/train/b"]


def test_a_failure_is_kept_with_its_traceback():
    run = training("abc")
    run.fail("a", "CUDA out of memory")
    assert run.last(TaskFailed) == TaskFailed(
        task_id=f"{RUN}/1/train/a", site="a", error="CUDA out of memory", traceback="Traceback"
    )
    assert run.offered == ["1/train/b", "1/train/c"]


def test_the_same_update_again_changes_nothing():
    run = training().updates("a")
    assert run.update("a") == ()


@pytest.mark.parametrize("later", ["closed", "published", "settled", "ended"])
def test_the_same_update_again_is_known_for_long(later):
    run = training("abc", rounds=2).updates("a", "b", "c")
    if later != "closed":
        run.publish()
    if later == "ended":
        run.abort()
    if later == "settled":
        run.updates("b", "c")
    assert run.update("a", number=1) == ()


def test_an_update_older_than_the_sites_latest_is_stale_even_if_once_accepted():
    run = training("abc", rounds=2).round().updates("a")
    with run.refused(FailedPreconditionError, "stale_round"):
        run.update("a", number=1)


def test_another_update_for_a_settled_task_is_refused():
    run = training().updates("a")
    with run.refused(AlreadyExistsError) as caught:
        run.update("a", model="other")
    assert str(caught.value) == (
        f"task {RUN}/1/train/a is settled by an earlier result; "
        "drop this one and take the next task"
    )


def test_another_update_is_refused_after_the_round_and_the_run_too():
    run = training().round()
    assert run.status == "finished"
    with run.refused(AlreadyExistsError):
        run.update("a", model="other")


def test_a_failure_settles_a_task_too():
    run = training()
    run.fail("a")
    assert run.fail("a", "another error") == ()
    with run.refused(AlreadyExistsError):
        run.update("a")


def test_a_failure_does_not_undo_an_update():
    run = training().updates("a")
    with run.refused(AlreadyExistsError):
        run.fail("a")


def test_an_update_of_a_closed_round_is_stale():
    run = training(rounds=2).updates("a", "b")
    run.fire("wait")
    with run.refused(FailedPreconditionError, "stale_round") as caught:
        run.update("c")
    assert f"round 1 of run {RUN} is closed: the update is stale" in str(caught.value)


@pytest.mark.parametrize("outcome", ["update", "fail"])
def test_what_comes_after_later_rounds_opened_is_stale(outcome):
    run = training(rounds=2).updates("a", "b")
    run.fire("wait")
    run.publish()
    task_id = run.task("c", number=1)
    with run.refused(FailedPreconditionError, "stale_round"):
        run.give(
            ResultArrived(task_id, TaskResult(ModelRef(digest("late"), 1), 1))
            if outcome == "update"
            else FailureArrived(task_id, TaskFailure("late"))
        )


def test_an_update_trained_from_another_model_is_refused():
    run = training(rounds=2).round()
    with run.refused(FailedPreconditionError, "wrong_base") as caught:
        run.update("a", base=INITIAL)
    assert digest(INITIAL) in str(caught.value)
    assert digest("global 1") in str(caught.value)


@pytest.mark.parametrize(
    ("site", "number"), [("c", 1), ("a", 2), ("x", 1)], ids=["newcomer", "future", "stranger"]
)
def test_a_task_that_was_never_offered_takes_no_update(site, number):
    run = Played("abc").accept("a", "b")
    run.fire("deploy")
    run.accept("c")
    with run.refused(FailedPreconditionError, "unknown_task"):
        run.update(site, number=number)


def test_nothing_was_offered_before_the_first_round():
    run = Played("ab")
    with run.refused(FailedPreconditionError, "unknown_task"):
        run.update("a", number=1)


def test_a_task_of_another_run_is_unknown_even_when_this_one_is_settled():
    run = training().updates("a")
    with run.refused(FailedPreconditionError, "unknown_task"):
        run.give(FailureArrived(TaskId(RUN + 1, 1, "train", "a"), TaskFailure("lost")))


@pytest.mark.parametrize("kind", ["submit_model", "validate.a", "validate.last"])
def test_a_gathering_that_is_not_open_takes_nothing(kind):
    run = training()
    with run.refused(FailedPreconditionError, "task_closed"):
        run.fail("a", kind=kind)


@pytest.mark.parametrize("outcome", ["update", "fail"])
def test_what_comes_after_the_end_is_refused(outcome):
    run = training().updates("a")
    run.abort()
    with run.refused(FailedPreconditionError, "run_ended") as caught:
        getattr(run, outcome)("b")
    assert str(caught.value) == f"run {RUN} is aborted: wrong data (rule: run_ended)"


@pytest.mark.parametrize("examples", [0, -1])
def test_an_update_without_examples_is_refused(examples):
    run = training()
    with run.refused(InvalidArgumentError) as caught:
        run.update("a", examples=examples)
    assert str(caught.value).startswith(f"examples: is {examples}; an update needs at least one")


@pytest.mark.parametrize("start", [training, validating])
def test_a_model_must_come_with_a_model_result(start):
    run = start()
    task = run.offers[0]
    with run.refused(InvalidArgumentError) as caught:
        run.give(ResultArrived(task.id, TaskResult(None, 10)))
    assert caught.value.field == "blob"


def test_classify_tells_new_from_known():
    run = training().updates("a")
    assert classify(run.state, run.task("b"), frozenset({digest("any")}))
    assert not classify(run.state, run.task("a"), frozenset({digest("1/a")}))


# ---- operator and server ------------------------------------------------------------------------


def test_a_set_quorum_is_kept_with_its_operator():
    run = training("abc")
    assert run.set_quorum(3) == (QuorumSet(min_clients=3, by="operator"),)


def test_setting_the_same_quorum_is_no_event():
    assert training("abc", min_clients=2).set_quorum(2) == ()


@pytest.mark.parametrize("min_clients", [0, -1, 4])
def test_a_quorum_lies_between_one_and_all_targets(min_clients):
    run = training("abc")
    with run.refused(InvalidArgumentError) as caught:
        run.set_quorum(min_clients)
    assert str(caught.value) == (
        f"min_clients: is {min_clients}; run {RUN} has 3 target sites; give 1 to 3"
    )


def test_a_quorum_that_the_declines_rule_out_is_refused():
    run = Played("abc").accept("a")
    run.decline("b")
    with run.refused(FailedPreconditionError, "quorum_unreachable") as caught:
        run.set_quorum(3)
    assert caught.value.hint == "give 1 to 2"


def test_a_quorum_that_would_fail_the_open_round_is_refused_until_the_round_has_closed():
    run = training("abcd")
    run.fail("d")
    with run.refused(FailedPreconditionError, "quorum_unreachable"):
        run.set_quorum(4)
    run.set_quorum(3)
    run.updates("a", "b", "c")
    run.set_quorum(4)


def test_a_lower_quorum_starts_a_deploying_run():
    run = Played("abc").accept("a")
    run.fire("deploy")
    run.set_quorum(1)
    assert run.offered == ["1/train/a"]


def played_to(phase: str) -> Played:
    fields = {"watch": {"metric": "accuracy"}, "rounds": 1}
    fields["workflow"] = ["scatter_gather", "cross_site_validation"]
    run = Played("ab", **fields)
    if phase == "deploying":
        return run
    run.accept()
    if phase == "training":
        return run
    run.updates("a", "b")
    if phase == "aggregating":
        return run
    run.publish()
    if phase == "scoring":
        return run
    run.validate("a", "last")
    run.validate("b", "last")
    if phase == "submitting":
        return run
    run.submit_model("a", "b")
    return run


PHASES = ["deploying", "training", "aggregating", "scoring", "submitting", "validating"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_can_be_aborted_in_every_phase(phase):
    run = played_to(phase)
    assert run.abort() == (RunEnded(status="aborted", reason="wrong data", by="operator"),)
    assert pending(run.state) == ()


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_server_cannot_do_fails_the_run_in_every_phase(phase):
    run = played_to(phase)
    assert run.break_down("disk on fire") == (RunEnded(status="failed", reason="disk on fire"),)
    assert run.break_down() == ()


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_survives_a_crash(phase):
    run = played_to(phase)
    run.crash()
    run.finish()
    assert run.status == "finished"


def test_an_ended_run_takes_no_commands():
    run = training().round()
    with run.refused(FailedPreconditionError, "run_ended"):
        run.set_quorum(1)
    with run.refused(FailedPreconditionError, "run_ended") as caught:
        run.abort()
    assert f"run {RUN} has finished: all steps done" in str(caught.value)


def test_an_ended_run_rests():
    run = training().round()
    assert run.last(RunEnded) == RunEnded(status="finished", reason="all steps done")
    assert run.go("a") == ()
    assert run.publish(1, "again") == ()
    assert run.give(TimerFired("wait/1/2")) == ()


@pytest.mark.parametrize("timer", ["", "deploy", "wait/1/2", "deadline/2", "quorum/1", "nonsense"])
def test_a_timer_that_is_not_pending_is_ignored(timer):
    run = training()
    assert timer not in run.wakes
    assert run.give(TimerFired(timer)) == ()


def test_steps_follow_one_another_in_the_jobs_order():
    run = training("ab", workflow=["cross_site_validation", "scatter_gather"])
    run.finish()
    assert [event.step for event in run.of(StepStarted)] == [
        "cross_site_validation",
        "scatter_gather",
    ]
    assert run.status == "finished"


def test_replay_needs_the_first_event():
    with pytest.raises(FailedPreconditionError, match="must begin with RunOpened"):
        replay([])
    with pytest.raises(FailedPreconditionError, match="must begin with RunOpened"):
        replay([SiteAnswered(site="a", accepted=True)])


def test_decide_leaves_the_state_alone():
    run = training()
    before = replay(run.events)
    given = ResultArrived(run.task("a"), TaskResult(ModelRef("d", 1), 1, trained_from="x"))
    with pytest.raises(FailedPreconditionError):
        decide(run.state, given, run.roster)
    assert run.state == before


def test_a_federation_event_has_no_place_in_a_run():
    stray = RunNumbered(run=1, submission_id="", job_digest="", job_name="", submitter="")
    with pytest.raises(TypeError, match="RunNumbered does not belong"):
        replay([*training().events, stray])
