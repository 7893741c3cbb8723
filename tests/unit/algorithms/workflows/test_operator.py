"""What operators do to a run that goes on."""

import pytest

from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.core.events import (
    GatherClosed,
    RoundClosed,
    RoundOpened,
    RunEnded,
    SiteWithdrawn,
    TargetsAdded,
    TaskFailed,
)
from flplatform.core.workflow import AnswerArrived, Deploy
from tests.support.workflows import Played, training, validating

# ---- withdrawals --------------------------------------------------------------------------------


def test_a_withdrawn_site_s_task_is_settled_with_the_reason():
    run = training().updates("a", "b")
    events = run.withdraw("c")
    assert events[:2] == (
        SiteWithdrawn(site="c", by="operator", reason="withdrawn by operator"),
        TaskFailed(task_id="7/1/train/c", site="c", error="withdrawn by operator"),
    )
    closed = run.last(RoundClosed)
    assert closed.reason == "all participants answered"
    assert [item.site for item in closed.contributions] == ["a", "b"]
    with run.refused(AlreadyExistsError):
        run.update("c", number=1)


def test_what_a_withdrawn_site_gave_stays_and_it_has_no_part_in_the_next_round():
    run = training(rounds=2).updates("a")
    run.withdraw("a")
    run.updates("b", "c").publish()
    assert [item.site for item in run.last(RoundClosed).contributions] == ["a", "b", "c"]
    assert run.last(RoundOpened).participants == ("b", "c")
    run.come("a")
    assert run.offered == ["2/train/b", "2/train/c"]


def test_a_lost_quorum_fails_the_round_by_name():
    run = training(min_clients=3)
    run.withdraw("c")
    assert run.last(RunEnded).reason == ("round 1 cannot reach quorum 3: c: withdrawn by operator")


def test_a_quorum_lost_between_rounds_is_waited_for_and_can_be_made_up_for():
    run = training(rounds=2, min_clients=3).updates("a", "b", "c")
    run.withdraw("c")
    run.publish()
    assert list(run.wakes) == ["quorum/2"]
    run.add("d")
    assert run.deploys == ["d"]
    run.come("d")
    run.accept("d")
    assert run.last(RoundOpened).participants == ("a", "b", "d")


def test_a_quorum_lost_before_the_first_round_fails_the_run():
    run = Played()
    run.decline("a")
    run.withdraw("b")
    assert run.last(RunEnded).reason == (
        "quorum 2 of 3 cannot be reached: a declined (accept_jobs: not today); "
        "b withdrawn by operator"
    )


def test_a_site_withdrawn_before_it_answered_is_not_waited_for():
    run = Played()
    run.accept("a", "b")
    run.withdraw("c")
    assert run.last(RoundOpened).participants == ("a", "b")
    assert run.give(AnswerArrived("c", True)) == ()


def test_withdrawing_all_that_are_left_ends_the_run():
    run = Played()
    run.decline("a")
    run.accept("b")
    run.withdraw("b", "c")
    assert run.last(RunEnded) == RunEnded(
        status="aborted", reason="withdrawn by operator", by="operator"
    )
    assert run.of(SiteWithdrawn) == []


def test_a_withdrawn_site_leaves_gaps_with_the_reason():
    run = validating("abc")
    run.submit_model("a", "b")
    run.withdraw("c")
    assert run.last(GatherClosed).gaps == {"7/0/submit_model/c": "withdrawn by operator"}
    assert {task.id.site for task in run.offers} == {"a", "b"}
    run.withdraw("b")
    assert set(run.state.gathers["validate"].failed.values())
    for owner in ("a", "b", "global"):
        run.validate("a", owner)
    assert run.last(GatherClosed).gaps == {
        f"7/0/validate.{owner}/b": "withdrawn by operator" for owner in ("a", "b", "global")
    }
    assert run.status == "finished"


def test_who_has_no_part_cannot_be_withdrawn():
    run = training("abcd")
    run.withdraw("d")
    with run.refused(FailedPreconditionError, "no_part") as caught:
        run.withdraw("a", "d")
    assert str(caught.value).startswith("d was withdrawn from run 7")
    with run.refused(NotFoundError):
        run.withdraw("stranger")


# ---- added targets ------------------------------------------------------------------------------


def test_added_sites_get_their_own_order_and_take_part_from_the_next_round():
    run = training("ab", rounds=2)
    run.come("c")
    assert run.add("c", order="its own") == (
        TargetsAdded(sites=("c",), order="its own", by="operator"),
    )
    assert Deploy("c", "its own") in run.pending
    run.accept("c")
    assert run.offered == ["1/train/a", "1/train/b"]
    run.round("a", "b")
    assert run.last(RoundOpened).participants == ("a", "b", "c")
    assert run.state.targets == ("a", "b", "c")


def test_an_answer_to_an_order_of_before_does_not_count():
    run = training("abc")
    run.withdraw("c")
    run.add("c", order="anew")
    assert run.give(AnswerArrived("c", True, order="")) == ()
    assert run.deploys == ["c"]
    run.give(AnswerArrived("c", True, order="anew"))
    assert run.state.deployed == {"a", "b", "c"}


def test_who_declined_may_be_asked_anew():
    run = Played("abc")
    run.accept("a", "b")
    run.decline("c")
    run.add("c")
    run.accept("c")
    run.round("a", "b")
    assert run.state.taking_part == {"a", "b", "c"}


def test_who_takes_part_cannot_be_added():
    run = training("ab")
    with run.refused(AlreadyExistsError):
        run.add("b", "c")
    with run.refused(InvalidArgumentError):
        run.add("server")
    run.abort()
    with run.refused(FailedPreconditionError, "run_ended"):
        run.add("c")


def test_the_quorum_may_grow_with_the_targets():
    run = training("ab", rounds=2)
    with run.refused(InvalidArgumentError):
        run.set_quorum(3)
    run.add("c")
    with run.refused(FailedPreconditionError, "quorum_unreachable"):
        run.set_quorum(3)  # the open round has two
    run.come("c")
    run.accept("c")
    run.updates("a", "b")
    run.set_quorum(3)
    run.publish()
    assert run.last(RoundOpened).participants == ("a", "b", "c")


# ---- aborted tasks ------------------------------------------------------------------------------


def test_an_aborted_task_has_failed_and_its_site_stays():
    run = training(rounds=2)
    assert run.abort_tasks("c") == (
        TaskFailed(task_id="7/1/train/c", site="c", error="aborted by operator"),
    )
    run.round("a", "b")
    assert run.last(RoundOpened).participants == ("a", "b", "c")


@pytest.mark.parametrize("again", ["c", "a"])
def test_there_must_be_a_task_to_abort(again):
    run = training()
    run.update("a")
    run.abort_tasks("c")
    with run.refused(FailedPreconditionError, "no_open_task"):
        run.abort_tasks(again)
    with run.refused(NotFoundError):
        run.abort_tasks("stranger")
