"""Returns each model as it came: a job that measures the platform and nothing else."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flplatform.client.api import Context, TrainResult, ValidateResult


def initial_model(args: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Draws "payload", float32 (size_mb * 250,000,): random, so that nothing compresses it."""
    count = round(float(args["size_mb"]) * 1e6 / 4)
    return {"payload": np.random.default_rng(seed).random(count, dtype=np.float32)}


def train(model: dict[str, np.ndarray], context: Context) -> TrainResult:  # noqa: ARG001 - the platform's signature
    return TrainResult(model, examples=1)


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:  # noqa: ARG001 - the platform's signature
    return ValidateResult({}, examples=1)
