import pytest

from flplatform.algorithms.workflows.state import evolve, gather_of, marks
from flplatform.core.events import (
    GatherOpened,
    ModelPublished,
    ResultAccepted,
    SiteDisabled,
    UpdateAccepted,
)
from tests.support.workflows import INITIAL, RUN, WATCH, Played, digest, training, validating


def test_a_fresh_state_is_what_the_first_event_says():
    state = Played("abc", min_clients=2).state
    assert (state.run, state.min_clients, state.round, state.step) == (RUN, 2, 0, -1)
    assert (state.status, state.step_name) == ("deploying", "")
    assert state.model.digest == digest(INITIAL)
    assert state.deployed == frozenset()


def test_evolving_leaves_the_old_state_alone():
    run = training("ab", rounds=2)
    before = run.state
    run.round()
    assert before.open_round.accepted == {}
    assert list(before.models) == [0]
    assert before.settled == {}


def test_an_open_round_knows_who_is_unsettled_and_what_is_possible():
    run = training("abc", min_clients=1)
    assert run.state.open_round.unsettled == ("a", "b", "c")
    run.fail("b")
    run.update("c")
    assert run.state.open_round.unsettled == ("a",)
    assert run.state.open_round.possible == 2


def test_a_published_model_ends_its_round():
    run = training("ab", rounds=2).updates("a", "b")
    assert run.state.open_round.closed.round == 1
    run.go("a", "b")
    run.publish()
    assert run.state.open_round is None
    assert run.state.round == 1


def test_unscored_the_latest_model_counts_as_best():
    run = training("ab", rounds=2).round()
    assert run.state.best_model == (1, run.last(ModelPublished).model)


def test_scored_the_best_model_may_be_the_initial_one():
    run = training("ab", watch=WATCH).round("a", "b", accuracy=0.9)
    run.validate("a", "last", 0.5)
    run.validate("b", "last", 0.5)
    number, model = run.state.best_model
    assert (number, model.digest) == (0, digest(INITIAL))


def test_a_model_is_known_by_its_digest():
    first = UpdateAccepted(task_id="1/1/train/a", site="a", round=1, digest="d", size=1, examples=1)
    assert marks(first) == {"d"}
    assert marks(first.model_copy(update={"metrics": {"loss": 1.0}})) == {"d"}


@pytest.mark.parametrize(
    ("examples", "metrics", "same"),
    [
        (10, {"loss": 1.0, "accuracy": 0.5}, True),
        (11, {"accuracy": 0.5, "loss": 1.0}, False),
        (10, {"accuracy": 0.5}, False),
        (10, {"accuracy": 0.5, "loss": 1.0000000000000002}, False),
    ],
)
def test_a_validation_is_known_by_its_numbers(examples, metrics, same):
    first = ResultAccepted(
        task_id="1/1/validate.a/a", site="a", examples=10, metrics={"accuracy": 0.5, "loss": 1.0}
    )
    again = first.model_copy(update={"examples": examples, "metrics": metrics})
    assert (marks(again) == marks(first)) is same


def test_a_task_finds_its_gathering():
    run = validating("ab")
    run.submit_model("a", "b")
    stages = {
        kind: gather_of(run.state, run.task("a", kind)).opened.stage
        for kind in ("submit_model", "validate.a", "validate.global")
    }
    assert stages == {
        "submit_model": "submit",
        "validate.a": "validate",
        "validate.global": "validate",
    }


@pytest.mark.parametrize(
    ("site", "kind", "number"),
    [("x", "submit_model", 0), ("a", "submit_model", 1), ("a", "validate.last", 0)],
)
def test_a_task_of_no_gathering_finds_none(site, kind, number):
    run = validating("ab")
    assert gather_of(run.state, run.task(site, kind, number)) is None


def test_scoring_and_validating_in_the_same_round_are_kept_apart():
    workflow = ["scatter_gather", "cross_site_validation"]
    run = training("ab", workflow=workflow, watch=WATCH).round()
    run.validate("a", "last")
    run.validate("b", "last")
    run.submit_model("a", "b")
    assert [event.stage for event in run.of(GatherOpened)] == ["score", "submit", "validate"]
    assert gather_of(run.state, run.task("a", "validate.last")).opened.stage == "score"


def test_a_federation_event_is_refused():
    with pytest.raises(TypeError, match="SiteDisabled does not belong into a run's stream"):
        evolve(Played().state, SiteDisabled(site="a", by="operator"))
