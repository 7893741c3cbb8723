"""Best local models are collected, then everyone validates every model; gaps are explicit."""

import pytest

from flplatform.core.errors import AlreadyExistsError, FailedPreconditionError
from flplatform.core.events import Blob, GatherClosed, GatherOpened, ResultAccepted
from flplatform.core.messages import SUBMIT_MODEL, ModelRef, task_seed
from tests.support.workflows import (
    INITIAL,
    SOURCE,
    WATCH,
    Played,
    digest,
    revalidating,
    training,
    validating,
)


def test_first_everyone_hands_in_its_best_model():
    run = validating("ab", validate_deadline_s=30, seed=42)
    assert run.status == "validating"
    assert run.offered == ["0/submit_model/a", "0/submit_model/b"]
    assert [task.model for task in run.offers] == [None, None]
    assert run.offers[0].seed == task_seed(42, 0, "submit_model", "a")
    assert run.wakes == {"gather/submit/0": 30}


def test_then_everyone_validates_every_model_and_the_global_one():
    run = validating("ab")
    run.submit_model("a", "b")
    assert run.offered == [
        f"0/validate.{owner}/{site}" for site in "ab" for owner in ("a", "b", "global")
    ]
    assert [task.model.digest for task in run.offers[:3]] == [
        digest("best of a"),
        digest("best of b"),
        digest(INITIAL),
    ]


def test_models_are_validated_in_the_order_of_their_owners():
    run = validating("az")
    run.submit_model("z", "a")
    assert run.offered[:3] == ["0/validate.a/a", "0/validate.global/a", "0/validate.z/a"]


def test_the_matrix_is_complete_when_all_answered():
    run = validating("ab")
    run.submit_model("a", "b")
    for task in run.offers:
        run.validate(task.id.site, task.id.owner, accuracy=0.75, examples=20)
    assert run.status == "finished"
    assert run.last(GatherClosed) == GatherClosed(
        stage="validate", reason="all participants answered", gaps={}
    )
    matrix = run.state.gathers["validate"].results
    assert len(matrix) == 6
    assert matrix[run.task("a", "validate.b")] == ResultAccepted(
        task_id="7/0/validate.b/a", site="a", examples=20, metrics={"accuracy": 0.75}
    )


def test_after_training_the_best_global_model_is_validated():
    workflow = ["scatter_gather", "cross_site_validation"]
    run = training("ab", workflow=workflow, rounds=2, watch=WATCH)
    run.round(accuracy=0.25).round(accuracy=0.75)
    run.validate("a", "last", 0.5)
    run.validate("b", "last", 0.5)
    run.submit_model("a", "b")
    assert run.last(GatherOpened).models["global"] == Blob(digest=digest("global 1"), size=100)
    assert run.last(GatherOpened).round == 2


def test_a_site_without_a_model_still_validates_those_of_others():
    run = validating("ab")
    run.submit_model("a")
    run.fail("b", "never trained", SUBMIT_MODEL)
    assert run.last(GatherOpened).participants == ("a", "b")
    assert set(run.last(GatherOpened).models) == {"a", "global"}
    assert run.of(GatherClosed)[0].gaps == {"7/0/submit_model/b": "never trained"}


def test_with_no_local_models_at_all_the_global_one_is_validated():
    run = validating("ab")
    run.fire("gather/submit")
    assert set(run.last(GatherOpened).models) == {"global"}


def test_every_missing_cell_names_why():
    run = validating("abcd")
    run.submit_model("a")
    run.go("c")
    run.disable("d")
    run.fire("gather/submit")
    run.fail("a", "wrong shape", "validate.a")
    run.validate("a", "global")
    assert run.offered[:2] == ["0/validate.a/b", "0/validate.global/b"]
    run.fire("gather/validate")
    assert run.last(GatherClosed) == GatherClosed(
        stage="validate",
        reason="deadline",
        gaps={
            "7/0/validate.a/a": "wrong shape",
            "7/0/validate.a/b": "deadline passed",
            "7/0/validate.global/b": "deadline passed",
            "7/0/validate.a/c": "site not connected",
            "7/0/validate.global/c": "site not connected",
            "7/0/validate.a/d": "site disabled",
            "7/0/validate.global/d": "site disabled",
        },
    )
    assert run.status == "finished"


def test_who_is_away_is_not_waited_for_while_others_are_there():
    run = validating("ab")
    run.submit_model("a")
    run.go("b")
    assert run.of(GatherClosed)[0].gaps == {"7/0/submit_model/b": "site not connected"}
    run.come("b")  # in time for the next gathering
    for site in "ba":
        for owner in ("a", "global"):
            run.validate(site, owner)
    assert run.status == "finished"
    assert run.last(GatherClosed).gaps == {}


def test_an_outage_is_waited_out_until_the_deadline():
    run = validating("ab")
    run.go("a", "b")
    assert run.last(GatherOpened).stage == "submit"
    run.come("a")
    run.submit_model("a")
    assert run.of(GatherClosed)[0].gaps == {"7/0/submit_model/b": "site not connected"}
    run.go("a")
    run.fire("gather/validate")
    assert run.status == "finished"
    assert len(run.last(GatherClosed).gaps) == 4


def test_a_site_that_will_not_come_can_be_disabled_withdrawn_or_have_its_tasks_given_up():
    for leave in (Played.disable, Played.withdraw, Played.abort_tasks):
        run = validating("ab")
        run.submit_model("a")
        leave(run, "b")
        assert run.last(GatherOpened).stage == "validate"
        if leave is Played.abort_tasks:
            leave(run, "b")
        run.validate("a", "a")
        run.validate("a", "global")
        assert run.status == "finished"


def test_a_site_that_comes_back_in_time_is_waited_for():
    run = validating("ab")
    run.go("b")
    run.come("b")
    run.submit_model("a")
    assert run.offered == ["0/submit_model/b"]


def test_quorum_does_not_matter_to_a_gathering():
    run = validating("ab")
    run.go("a", "b")
    run.fire("gather/submit")
    run.fire("gather/validate")
    assert run.status == "finished"
    assert len(run.last(GatherClosed).gaps) == 2


def test_sites_that_declined_are_not_asked():
    run = Played("abc", workflow=["cross_site_validation"]).accept("a", "b")
    run.decline("c")
    assert run.offered == ["0/submit_model/a", "0/submit_model/b"]


def test_a_latecomer_is_not_asked():
    run = Played("abc", workflow=["cross_site_validation"]).accept("a", "b")
    run.fire("deploy")
    run.accept("c")
    assert run.offered == ["0/submit_model/a", "0/submit_model/b"]
    with run.refused(FailedPreconditionError, "task_closed"):
        run.submit_model("c")


def validated() -> Played:
    run = validating("ab")
    run.submit_model("a", "b")
    run.validate("a", "b", 0.5)
    return run


def test_the_same_result_again_changes_nothing():
    assert validated().validate("a", "b", 0.5) == ()


def test_another_result_for_a_settled_cell_is_refused():
    run = validated()
    with run.refused(AlreadyExistsError):
        run.validate("a", "b", 0.75)
    with run.refused(AlreadyExistsError):
        run.validate("a", "b", 0.5, examples=11)
    with run.refused(AlreadyExistsError):
        run.fail("a", kind="validate.b")


def test_the_same_result_again_is_known_after_the_end():
    run = validated()
    run.fire("gather/validate")
    assert run.status == "finished"
    assert run.validate("a", "b", 0.5) == ()
    with run.refused(FailedPreconditionError, "run_ended"):
        run.validate("b", "a")


@pytest.mark.parametrize(("site", "owner"), [("a", "c"), ("c", "a"), ("a", "last")])
def test_a_cell_outside_the_matrix_is_refused(site, owner):
    run = validated()
    with run.refused(FailedPreconditionError, "task_closed"):
        run.validate(site, owner)


def test_a_model_handed_in_late_is_refused():
    run = validating("ab")
    run.submit_model("a")
    run.fire("gather/submit")
    with run.refused(FailedPreconditionError, "task_closed"):
        run.submit_model("b")


def test_models_are_offered_as_they_were_handed_in():
    run = validating("ab")
    run.submit_model("a", "b")
    run.crash()
    assert run.offers[0].model == ModelRef(digest("best of a"), 100)


# ---- on demand ----------------------------------------------------------------------------------


def test_on_demand_the_models_of_the_source_run_are_validated_at_once():
    run = revalidating("ab", seed=42, validate_deadline_s=30)
    assert run.status == "validating"
    assert run.offered == [
        f"3/validate.{owner}/{site}" for site in "ab" for owner in ("a", "b", "global")
    ]
    digests = [model.digest for _, model in sorted(SOURCE["source_models"].items())]
    assert [task.model.digest for task in run.offers[:3]] == digests
    assert run.offers[0].seed == task_seed(42, 3, "validate.a", "a"), "as in the source run"
    assert run.wakes == {"gather/validate/3": 30}
    for task in run.offers:
        run.crash()
        run.validate(task.id.site, task.id.owner)
    assert run.status == "finished"
    assert not run.of(GatherClosed)[0].gaps
    assert len(run.of(GatherOpened)) == 1


def test_on_demand_a_site_that_comes_back_gets_its_tasks():
    run = revalidating("ab")
    run.go("a", "b")
    assert run.status == "validating"
    run.come("b")
    for owner in ("a", "b", "global"):
        run.validate("b", owner)
    assert run.status == "finished"
    assert run.last(GatherClosed).gaps == {
        f"7/3/validate.{owner}/a": "site not connected" for owner in ("a", "b", "global")
    }


def test_on_demand_a_run_that_everybody_declines_fails():
    run = Played("ab", SOURCE, workflow=["cross_site_validation"], min_clients=1)
    run.decline("a", "policy commands: validate = none")
    run.decline("b")
    assert run.status == "failed"
    assert "validate = none" in run.state.ended.reason


def test_on_demand_nothing_but_validation_is_taken():
    run = revalidating("ab")
    for kind in ("train", SUBMIT_MODEL):
        with run.refused(
            FailedPreconditionError, "stale_round" if kind == "train" else "task_closed"
        ):
            run.fail("a", kind=kind)
