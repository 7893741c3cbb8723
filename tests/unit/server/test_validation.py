import pytest

from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import SUBMIT_MODEL, TaskId
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.validation import ValidateResultProcessor, cross_validation
from tests.support.workflows import SOURCE, Played, validating
from tests.unit.server.scene import OTHER_DIGEST

TASK = TaskId(1, 2, "validate.b", "a")


def test_metrics_of_a_model_on_a_sites_data() -> None:
    outcome = pb.TaskOutcome(examples=5, metrics={"accuracy": 0.5})
    result = ValidateResultProcessor().process(TASK, outcome)
    assert (result.blob, result.examples, result.metrics) == (None, 5, {"accuracy": 0.5})


@pytest.mark.parametrize(
    "outcome",
    [
        pb.TaskOutcome(blob=pb.Blob(digest=OTHER_DIGEST, size=1)),
        pb.TaskOutcome(metrics={"accuracy": float("nan")}),
        pb.TaskOutcome(examples=1 << 50),
    ],
)
def test_other_outcomes_are_refused(outcome: pb.TaskOutcome) -> None:
    with pytest.raises(InvalidArgumentError):
        ValidateResultProcessor().process(TASK, outcome)


def test_before_the_step_there_is_nothing() -> None:
    matrix = cross_validation(Played().state)
    assert (matrix.owners, matrix.sites, matrix.cells, matrix.gaps) == ((), (), {}, {})
    assert not matrix.complete


def test_a_full_matrix() -> None:
    run = validating("ab")
    run.submit_model("a", "b")
    for site in "ab":
        for owner in ("a", "b", "global"):
            assert not cross_validation(run.state).complete
            run.validate(site, owner, 0.25)
    matrix = cross_validation(run.state)
    assert matrix.owners == ("a", "b", "global")
    assert matrix.sites == ("a", "b")
    assert set(matrix.cells) == {(owner, site) for owner in matrix.owners for site in "ab"}
    assert matrix.cells["a", "b"] == {"accuracy": 0.25}
    assert matrix.gaps == {}
    assert matrix.complete


def test_every_gap_has_its_reason() -> None:
    run = Played("abc", workflow=["cross_site_validation"], min_clients=1)
    run.accept("a", "b")
    run.decline("c", "policy submitters")
    run.submit_model("a")
    run.fail("b", "no best model", SUBMIT_MODEL)
    run.validate("a", "a")
    run.fail("a", "out of memory", "validate.global")
    run.validate("b", "global")
    run.fire("gather/validate")
    matrix = cross_validation(run.state)
    assert matrix.owners == ("a", "global")
    assert matrix.sites == ("a", "b")
    assert set(matrix.cells) == {("a", "a"), ("global", "b")}
    assert matrix.gaps == {
        ("*", "c"): "declined: policy submitters",
        ("b", "*"): "no local model: no best model",
        ("global", "a"): "out of memory",
        ("a", "b"): "deadline passed",
    }
    assert matrix.complete


def test_on_demand_every_row_says_which_model_it_is() -> None:
    run = Played("abd", SOURCE, workflow=["cross_site_validation"], min_clients=1)
    run.accept("a")
    run.decline("b", "policy commands: validate = none")
    run.fire("deploy")
    run.validate("a", "global")
    run.fire("gather/validate")
    matrix = cross_validation(run.state)
    assert matrix.source_run == 5
    assert matrix.global_round == 2
    assert matrix.owners == ("a", "b", "global")
    assert (matrix.models["b"].kind, matrix.models["b"].round) == ("update", 3)
    assert set(matrix.cells) == {("global", "a")}
    assert matrix.gaps == {
        ("*", "b"): "declined: policy commands: validate = none",
        ("*", "d"): "it did not answer the start in time (deploy_wait_s)",
        ("c", "*"): "no local model: it handed none in, and no update of it is kept",
        ("a", "a"): "deadline passed",
        ("b", "a"): "deadline passed",
    }
