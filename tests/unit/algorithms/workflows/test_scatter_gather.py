"""When rounds open and close, with what, and how models are scored."""

from itertools import permutations

import pytest

from flplatform.algorithms.workflows import classify
from flplatform.core.events import (
    Blob,
    DeadlineExtended,
    GatherClosed,
    GatherOpened,
    ModelPublished,
    ModelScored,
    RoundClosed,
    RoundOpened,
    RunEnded,
    Target,
)
from flplatform.core.messages import ModelRef, TaskResult, task_seed
from flplatform.core.workflow import Aggregated, Offer, ResultArrived
from tests.support.workflows import INITIAL, WATCH, Played, digest, training

# ---- opening ------------------------------------------------------------------------------------


def test_a_round_opens_with_everyone_live_and_deployed():
    run = Played("abcd")
    run.go("b")
    run.disable("c")
    run.accept()
    assert run.last(RoundOpened) == RoundOpened(
        round=1, participants=("a", "d"), model=Blob(digest=digest(INITIAL), size=100)
    )


def test_each_participant_is_offered_its_task_with_seed_and_model():
    task = training("ab", seed=42).offers[1]
    assert str(task.id) == "7/1/train/b"
    assert task.seed == task_seed(42, 1, "train", "b")
    assert task.model == ModelRef(digest(INITIAL), 100)


def test_the_next_round_opens_with_the_published_model():
    run = training("ab", rounds=2).round()
    assert run.last(RoundOpened).round == 2
    assert run.last(RoundOpened).model.digest == digest("global 1")


def test_participants_are_frozen_and_a_newcomer_joins_the_next_round():
    run = Played("abc", rounds=2).accept("a", "b")
    run.fire("deploy")
    run.accept("c")
    assert run.offered == ["1/train/a", "1/train/b"]
    run.round("a", "b")
    assert run.offered == ["2/train/a", "2/train/b", "2/train/c"]


def test_a_site_that_comes_back_joins_the_next_round():
    run = Played("abc", rounds=2)
    run.go("c")
    run.accept()
    run.come("c")
    assert run.offered == ["1/train/a", "1/train/b"]
    run.round("a", "b")
    assert "2/train/c" in run.offered


def test_the_next_round_waits_for_a_quorum():
    run = training("abc", rounds=2, quorum_wait_s=900).updates("a", "b", "c")
    run.go("b", "c")
    run.publish()
    assert run.offered == []
    assert run.wakes == {"quorum/2": 900}
    run.come("c")
    assert run.offered == ["2/train/a", "2/train/c"]


def test_a_lower_quorum_opens_the_next_round():
    run = training("abc", rounds=2).updates("a", "b", "c")
    run.go("b", "c")
    run.publish()
    run.set_quorum(1)
    assert run.offered == ["2/train/a"]


def test_without_a_quorum_for_the_next_round_the_run_fails():
    run = training("abc", rounds=2).updates("a", "b", "c")
    run.go("b", "c")
    run.publish()
    run.fire("quorum")
    assert "only 1 of 2 needed sites" in run.last(RunEnded).reason


def test_a_quorum_timer_that_comes_with_the_quorum_opens_the_round():
    run = training("abc", rounds=2).updates("a", "b", "c")
    run.go("b", "c")
    run.publish()
    run.roster = Played("ab").roster
    run.fire("quorum")
    assert run.last(RoundOpened).round == 2


# ---- closing ------------------------------------------------------------------------------------


def closed(run: Played) -> str:
    """Return why the latest round closed, `` if it is open."""
    closings = run.of(RoundClosed)
    return closings[-1].reason if len(closings) == len(run.of(RoundOpened)) else ""


def test_a_round_closes_when_everyone_answered():
    run = training("abc").updates("a", "b")
    assert not closed(run)
    run.update("c")
    assert closed(run) == "all participants answered"
    assert run.aggregations == [1]
    assert run.offered == []


def test_a_closed_round_names_everything_that_aggregation_reads():
    args = {"exclude_vars": "bn.*", "site_weights": {"a": 0.5}}
    run = training("abc", aggregator={"name": "weighted_mean", "args": args})
    run.update("c", examples=30)
    run.update("a", examples=10)
    run.fire("wait")
    assert run.last(RoundClosed) == RoundClosed(
        round=1,
        reason="quorum and wait_after_min_s",
        contributions=(
            Target(site="a", digest=digest("1/a"), size=100, weight=5.0),
            Target(site="c", digest=digest("1/c"), size=100, weight=30.0),
        ),
        stragglers=("b",),
        base=Blob(digest=digest(INITIAL), size=100),
        aggregator="weighted_mean",
        aggregator_args=args,
    )


@pytest.mark.parametrize("excuse", ["go", "disable", "fail"])
def test_a_quorum_need_not_wait_for_the_excused(excuse):
    run = training("abc").updates("a", "b")
    getattr(run, excuse)("c")
    assert closed(run) == "all participants answered"
    assert run.last(RoundClosed).stragglers == (() if excuse == "fail" else ("c",))


@pytest.mark.parametrize("excuse", ["go", "disable", "fail"])
def test_excused_before_the_last_update_the_round_closes_with_it(excuse):
    run = training("abc").updates("a")
    getattr(run, excuse)("c")
    assert not closed(run), "never below min_clients"
    run.update("b")
    assert closed(run) == "all participants answered"


def test_a_site_that_went_and_came_back_is_waited_for():
    run = training("abc").updates("a")
    run.go("c")
    run.come("c")
    run.update("b")
    assert not closed(run)
    run.update("c")
    assert [target.site for target in run.last(RoundClosed).contributions] == ["a", "b", "c"]


def test_an_absent_sites_task_stays_open():
    run = training("abc")
    run.go("c")
    assert "1/train/c" in run.offered
    run.update("c")
    run.update("a")
    assert not closed(run)


def test_a_round_never_closes_below_min_clients():
    run = training("abc", min_clients=3).updates("a", "b")
    run.go("c")
    assert not closed(run)
    assert "wait/1/3" not in run.wakes


def test_at_quorum_stragglers_get_a_last_chance():
    run = training("abc", wait_after_min_s=5, round_deadline_s=600).updates("a")
    assert run.wakes == {"deadline/1": 600}
    run.update("b")
    assert run.wakes == {"wait/1/2": 5, "deadline/1": 600}
    run.fire("wait")
    assert closed(run) == "quorum and wait_after_min_s"
    assert run.last(RoundClosed).stragglers == ("c",)


def test_a_changed_quorum_waits_anew():
    run = training("abcd", min_clients=2).updates("a", "b", "c")
    assert "wait/1/2" in run.wakes
    run.set_quorum(3)
    assert "wait/1/3" in run.wakes
    assert "wait/1/2" not in run.wakes


def test_a_raised_quorum_stops_the_wait():
    run = training("abcd", min_clients=2).updates("a", "b")
    run.set_quorum(3)
    assert list(run.wakes) == ["deadline/1"]


def test_a_lower_quorum_closes_the_round_if_nobody_is_waited_for():
    run = training("abc", min_clients=3).updates("a", "b")
    run.go("c")
    run.set_quorum(2)
    assert closed(run) == "all participants answered"


def test_the_deadline_closes_a_round_that_has_its_quorum():
    run = training("abc", wait_after_min_s=600).updates("a", "b")
    run.fire("deadline")
    assert closed(run) == "deadline"


def test_below_quorum_the_deadline_is_extended_once_then_the_run_aborts():
    run = training("abc", on_deadline="extend").updates("a")
    assert run.fire("deadline") == (DeadlineExtended(round=1),)
    assert list(run.wakes) == ["deadline/1/extended"]
    run.fire("deadline")
    assert run.last(RunEnded) == RunEnded(
        status="aborted",
        reason="the deadline of round 1 passed with 1 of 2 needed updates; missing: b, c "
        "(on_deadline: extend)",
        by="workflow",
    )


def test_an_extended_round_closes_as_any_other():
    run = training("abc").updates("a")
    run.fire("deadline")
    run.updates("b", "c")
    assert closed(run) == "all participants answered"


def test_each_round_may_extend_its_deadline():
    run = training("ab", rounds=2)
    run.fire("deadline")
    run.round()
    assert run.fire("deadline") == (DeadlineExtended(round=2),)


def test_on_deadline_abort_does_not_extend():
    run = training("abc", on_deadline="abort").updates("a")
    run.fire("deadline")
    assert run.of(DeadlineExtended) == []
    assert run.last(RunEnded).reason.endswith("missing: b, c (on_deadline: abort)")


def test_failures_that_rule_a_quorum_out_fail_the_run_and_are_named():
    run = training("abc")
    run.fail("a", "no such file: heart.csv")
    assert not run.state.ended
    run.fail("c", "CUDA out of memory")
    assert run.last(RunEnded) == RunEnded(
        status="failed",
        reason="round 1 cannot reach quorum 2: a: no such file: heart.csv; c: CUDA out of memory",
    )


def test_a_failed_site_takes_part_in_the_next_round():
    run = training("abc", rounds=2)
    run.fail("c")
    run.round("a", "b")
    assert "2/train/c" in run.offered


def test_a_closed_round_stays_as_it_closed():
    run = training("abc").updates("a", "b")
    run.fire("wait")
    assert run.go("c") == ()
    run.set_quorum(1)
    assert len(run.of(RoundClosed)) == 1


# ---- publishing ---------------------------------------------------------------------------------


def test_rounds_follow_one_another_to_the_last():
    run = training("ab", rounds=3)
    for number in (1, 2, 3):
        run.updates("a", "b")
        assert run.publish()[0] == ModelPublished(
            round=number, model=Blob(digest=digest(f"global {number}"), size=100)
        )
    assert run.status == "finished"
    assert run.state.model.digest == digest("global 3")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_model_that_no_closed_round_waits_for_is_ignored(number):
    assert training("ab").publish(number) == ()


def test_a_model_of_another_round_than_the_closed_one_is_ignored():
    run = training("ab").updates("a", "b")
    assert run.publish(2) == ()


def test_a_model_that_comes_after_an_abort_is_ignored():
    run = training("ab").updates("a", "b")
    run.abort()
    assert run.publish(1) == ()


def test_a_second_model_of_a_round_is_ignored():
    run = training("ab", rounds=2).round()
    assert run.publish(1, "other") == ()
    assert run.state.model.digest == digest("global 1")


# ---- scoring ------------------------------------------------------------------------------------


def scored(run: Played, *rounds: tuple[float, float]) -> list[ModelScored]:
    """Play rounds in which `a` and `b` measure these accuracies on the received model."""
    for of_a, of_b in rounds:
        run.update("a", accuracy=of_a)
        run.update("b", accuracy=of_b)
        run.publish()
    return run.of(ModelScored)


def test_a_model_is_scored_in_the_next_round_by_tested_not_by_trained_examples():
    run = training("ab", watch=WATCH)
    run.update("a", accuracy=0.5, tested=10, examples=1000)
    run.update("b", accuracy=1.0, tested=30, examples=1)
    assert run.of(ModelScored) == [ModelScored(round=0, score=0.875, examples=40, best=True)]


def test_the_last_model_is_scored_by_a_closing_task():
    run = training("ab", watch=WATCH)
    scored(run, (0.5, 0.5))
    assert run.offered == ["1/validate.last/a", "1/validate.last/b"]
    assert {task.model for task in run.offers} == {ModelRef(digest("global 1"), 100)}
    run.validate("a", "last", 0.25, examples=10)
    run.validate("b", "last", 1.0, examples=20)
    assert run.last(ModelScored) == ModelScored(round=1, score=0.75, examples=30, best=True)
    assert run.status == "finished"


def test_ties_keep_the_earlier_model():
    run = training("ab", rounds=3, watch=WATCH)
    scores = scored(run, (0.5, 0.5), (0.75, 0.75), (0.75, 0.75))
    assert [event.best for event in scores] == [True, True, False]
    assert run.state.best_round == 1


def test_the_least_can_be_the_best():
    run = training("ab", rounds=3, watch=WATCH | {"mode": "min"})
    scores = scored(run, (0.5, 0.5), (0.75, 0.75), (0.25, 0.25))
    assert [event.best for event in scores] == [True, False, True]


def test_sites_that_do_not_report_the_metric_do_not_count():
    run = training("ab", watch=WATCH)
    run.update("a")
    run.update("b", accuracy=0.25)
    assert run.last(ModelScored).score == 0.25
    assert run.last(ModelScored).examples == 10


def test_a_report_without_examples_does_not_count():
    run = training("ab", watch=WATCH)
    run.update("a", accuracy=1.0, tested=0)
    run.update("b", accuracy=0.25)
    assert run.last(ModelScored).score == 0.25


def test_a_model_that_nobody_measured_has_no_score():
    run = training("ab", watch=WATCH).updates("a", "b")
    assert run.of(ModelScored) == []


def test_a_score_too_large_for_a_float_is_no_score_and_stops_nothing():
    run = training("ab", watch=WATCH)
    run.update("a", accuracy=1.7e308)
    run.update("b", accuracy=1.7e308)
    assert run.of(ModelScored) == []
    assert run.aggregations == [1]


def test_without_a_watched_metric_nothing_is_scored():
    run = training("ab")
    assert scored(run, (0.5, 0.5)) == []
    assert run.status == "finished"


def test_failed_closing_tasks_leave_the_last_model_unscored_and_the_gap_explicit():
    run = training("ab", watch=WATCH)
    scored(run, (0.5, 0.5))
    run.fail("a", "no data", "validate.last")
    run.go("b")
    assert run.last(GatherClosed).gaps == {
        "7/1/validate.last/a": "no data",
        "7/1/validate.last/b": "site not connected",
    }
    assert run.status == "finished"
    assert run.state.best_round == 0


def test_the_closing_tasks_have_a_deadline():
    run = training("ab", watch=WATCH, validate_deadline_s=30)
    scored(run, (0.5, 0.5))
    run.validate("a", "last", 0.75)
    assert run.wakes == {"gather/score/1": 30}
    run.fire("gather/score")
    assert run.last(ModelScored).score == 0.75
    assert run.last(GatherClosed).gaps == {"7/1/validate.last/b": "deadline passed"}


def test_a_score_does_not_depend_on_the_order_of_arrival():
    scores = set()
    for order in permutations("abc"):
        run = training("abc", watch=WATCH).round()
        for site in order:
            run.validate(site, "last", accuracy=1 / ord(site), examples=ord(site))
        scores.add(run.last(ModelScored).score)
    assert len(scores) == 1


def test_the_closing_tasks_go_to_those_who_are_there():
    run = training("abc", watch=WATCH).updates("a", "b", "c", accuracy=0.5)
    run.go("b")
    run.publish()
    assert run.last(GatherOpened).participants == ("a", "c")


def test_with_nobody_there_the_last_model_goes_unscored():
    run = training("ab", watch=WATCH).updates("a", "b", accuracy=0.5)
    run.go("a", "b")
    run.publish()
    assert run.status == "finished"
    assert run.state.scores == {0: 0.5}


def offered(run, site):
    (task,) = (
        item.task for item in run.pending if isinstance(item, Offer) and item.task.id.site == site
    )
    return task


def test_train_tasks_name_the_codecs_and_the_model_as_it_crosses_the_wire():
    run = Played(
        "ab",
        {"wire": Blob(digest=digest("w0"), size=50)},
        codec="int8",
        codec_down="bf16",
        rounds=2,
    )
    run.accept()
    task = offered(run, "a")
    assert (task.codec, task.wire, task.wire_codec) == ("int8", ModelRef(digest("w0"), 50), "bf16")
    assert task.model == ModelRef(digest(INITIAL), 100)
    run.updates("a", "b")
    wire = ModelRef(digest("w1"), 60)
    run.give(Aggregated(1, ModelRef(digest("m1"), 100), None, wire))
    assert run.last(ModelPublished).wire == Blob(digest=digest("w1"), size=60)
    task = offered(run, "a")
    assert (task.model, task.wire) == (ModelRef(digest("m1"), 100), wire)


def test_without_codec_down_the_model_itself_is_named():
    task = offered(training("ab"), "a")
    assert (task.codec, task.wire, task.wire_codec) == ("none", None, "none")


@pytest.mark.parametrize("again", ["model", "wire"])
def test_an_encoded_update_is_known_by_what_came_and_by_what_it_came_to(again):
    run = training("ab", codec="zstd")
    base = run.state.open_round.opened.model.digest
    result = TaskResult(ModelRef(digest("model"), 100), 5, trained_from=base, wire=digest("wire"))
    (event,) = run.give(ResultArrived(run.task("a"), result))
    assert (event.digest, event.wire) == (digest("model"), digest("wire"))
    assert not classify(run.state, run.task("a"), frozenset({digest(again)}))
    assert run.give(ResultArrived(run.task("a"), result)) == ()
