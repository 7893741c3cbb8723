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


@pytest.mark.torch
def test_torch_with_one_process_of_a_group(job_module, heart_context):
    check_against_numpy("heart_ddp", job_module, heart_context)


@pytest.mark.torch
def test_processes_share_each_batch(job_module, heart_context):
    batches = job_module("heart_ddp", "heart_ddp").batches
    shares = [batches(20, 9, heart_context(rank=rank, world_size=2)) for rank in (0, 1)]
    for _ in range(5):
        mine, theirs = (next(share).tolist() for share in shares)
        assert (len(mine), len(theirs)) == (4, 4)
        assert not set(mine) & set(theirs)
    with pytest.raises(ValueError, match="smaller than 3 processes"):
        next(batches(20, 2, heart_context(world_size=3)))


@pytest.mark.tensorflow
def test_tensorflow(job_module, heart_context):
    check_against_numpy("heart_tensorflow", job_module, heart_context)
