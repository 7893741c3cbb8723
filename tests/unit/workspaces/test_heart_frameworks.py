"""The job heart in PyTorch and TensorFlow against the one in NumPy."""

import numpy as np
import pytest

ONE_BATCH = {"learning_rate": 0.5, "local_updates": 3, "batch_size": 10_000}
"""With all rows in each batch their order does not count, and the variants must agree."""


def check_against_numpy(job, job_module, heart_context):
    heart = job_module("heart", "heart")
    start = heart.initial_model({}, 42)
    context = heart_context("hungary", args=ONE_BATCH)
    expected = heart.train(start, context)
    scores = heart.validate(start, context)

    model = job_module(job, "initial").initial_model({}, 42)
    for array in model.values():
        array.flags.writeable = False  # as the platform hands them out
    variant = job_module(job, job)
    result = variant.train(model, context)
    assert result.examples == expected.examples
    for name, (ours, theirs) in zip(
        model, zip(expected.model.values(), result.model.values(), strict=True), strict=True
    ):
        assert result.model[name].shape == model[name].shape
        assert result.model[name].dtype == np.float32
        np.testing.assert_allclose(ours.ravel(), theirs.ravel(), atol=1e-5)
    assert variant.validate(model, context).metrics == pytest.approx(scores.metrics, abs=1e-6)
    assert variant.validate(model, context).examples == scores.examples

    again = [variant.train(model, heart_context("va")).model for _ in range(2)]
    other = variant.train(model, heart_context("va", seed=8)).model
    for name in model:
        np.testing.assert_array_equal(again[0][name], again[1][name])
        assert not np.array_equal(again[0][name], other[name])


@pytest.mark.torch
def test_torch(job_module, heart_context):
    check_against_numpy("heart_torch", job_module, heart_context)


@pytest.mark.tensorflow
def test_tensorflow(job_module, heart_context):
    check_against_numpy("heart_tensorflow", job_module, heart_context)
