"""What user code may return, and what it is told when it is wrong."""

import math
from pathlib import Path

import numpy as np
import pytest

from flplatform.client import api
from flplatform.client.api import Context, TrainResult, ValidateResult, check_train, check_validate
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError, ModelFormatError
from flplatform.core.model import Manifest

MODEL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.int64)}
MANIFEST = Manifest.of(MODEL)
CONTEXT = Context(1, 2, 3, "site-1", {}, {}, Path("state"))


class Recorder:
    """A session that notes what is logged."""

    def __init__(self):
        self.logged = []

    def receive(self):
        return None

    def send(self, result):
        self.sent = result

    def log_metric(self, *metric):
        self.logged.append(metric)


@pytest.fixture
def session():
    recorder = Recorder()
    api.attach(recorder)
    yield recorder
    api.attach(None)


class Scalar:
    """Like a framework's tensor of one value."""

    def __float__(self):
        return 0.5


@pytest.mark.parametrize(
    "result",
    [
        TrainResult(MODEL, 3),
        TrainResult(MODEL, np.int64(3), {"loss": Scalar()}),
        (MODEL, 3),
        (MODEL, 3, {"loss": np.float32(0.5)}),
    ],
)
def test_train_results(result):
    checked = check_train(result, MANIFEST)
    assert checked.examples == 3
    assert type(checked.examples) is int
    assert checked.metrics in ({}, {"loss": 0.5})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "train: must return TrainResult(model, examples, metrics), returned NoneType"),
        (MODEL, "returned dict"),
        ((MODEL,), "returned a tuple of 1"),
        (ValidateResult({}, 1), "returned ValidateResult"),
        (([1, 2], 3), "train: model: is not a dict of named NumPy arrays"),
        (({1: MODEL["w"]}, 3), "train: model: is not a dict"),
        ((MODEL, 3.0), "train: examples: is a float, not an integer"),
        ((MODEL, True), "train: examples: is a bool"),
        ((MODEL, -1), "train: examples: -1 is not between"),
        ((MODEL, 3, 0.5), "train: metrics: is not a dict"),
        ((MODEL, 3, {"loss": "low"}), "train: metrics['loss']: is a str, not a number"),
        ((MODEL, 3, {"loss": math.nan}), "train: metrics['loss']: is nan"),
        ((MODEL, 3, {"loss": np.zeros(2)}), "train: metrics['loss']: is a ndarray"),
        ((MODEL, 3, {1: 0.5}), "train: metrics: is not a dict"),
    ],
)
def test_wrong_train_results(result, message):
    with pytest.raises(InvalidArgumentError) as caught:
        check_train(result, MANIFEST)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "model['b']: is a NoneType, not a numpy array"),
        ({"w": np.zeros((2, 2))}, "model['w']: is F64[2, 2], the model has F32[2, 2]"),
        ({"w": np.zeros(4, np.float32)}, "model['w']: is F32[4]"),
        ({"w": np.full((2, 2), np.nan, np.float32)}, "model['w']: 4 of 4 values are NaN"),
        ({"w": np.zeros((2, 2), complex)}, "model['w']: dtype complex128 is not supported"),
        ({"x": np.zeros(1)}, "model['x']: the model has no such tensor"),
    ],
)
def test_wrong_models_name_the_tensor(change, message):
    with pytest.raises(ModelFormatError) as caught:
        check_train((MODEL | change, 3), MANIFEST)
    assert message in str(caught.value)
    with pytest.raises(ModelFormatError, match=r"model\['b'\]: tensor is missing"):
        check_train(({"w": MODEL["w"]}, 3), MANIFEST)


def test_validate_results():
    assert check_validate(({"loss": np.float64(1)}, 2), "loss") == ValidateResult({"loss": 1.0}, 2)
    with pytest.raises(InvalidArgumentError, match="no 'acc', which the job watches; returned: a"):
        check_validate(ValidateResult({"a": 1.0}, 2), "acc")
    for wrong in (None, {"a": 1}, (1, 2, 3), TrainResult(MODEL, 3)):
        with pytest.raises(InvalidArgumentError, match="validate: must return ValidateResult"):
            check_validate(wrong)


def test_default_metrics_cannot_be_shared():
    with pytest.raises(TypeError):
        TrainResult(MODEL, 1).metrics["loss"] = 1.0


def test_log_metric(session):
    CONTEXT.log_metric("loss", np.float32(0.5), np.int32(3))
    CONTEXT.log_metric("loss", 1)
    assert session.logged == [("loss", 0.5, 3), ("loss", 1.0, None)]
    for wrong in (("loss", math.inf), ("loss", None), ("", 1.0), ("x", 1, -1), ("x", 1, 0.5)):
        with pytest.raises(InvalidArgumentError, match="log_metric"):
            CONTEXT.log_metric(*wrong)


def test_functions_of_a_session(session):
    assert api.receive() is None
    api.send((MODEL, 3))
    assert session.sent == (MODEL, 3)


def test_outside_a_run_process():
    CONTEXT.log_metric("loss", 1.0)
    for call in (api.receive, lambda: api.send((MODEL, 3))):
        with pytest.raises(FailedPreconditionError, match="only in a script that a site runs"):
            call()
