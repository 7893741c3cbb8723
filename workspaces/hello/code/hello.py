"""The smallest job: a model of one number, to which each site adds its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flplatform.client.api import Context, TrainResult, ValidateResult


def initial_model(args: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:  # noqa: ARG001 - the platform's signature
    """Runs once, at the admin's: a model is arrays by name."""
    return {"total": np.zeros(1, dtype=np.float32)}


def train(model: dict[str, np.ndarray], context: Context) -> TrainResult:
    """Runs at every site in every round; the server then averages what the sites return.

    `examples` is a site's weight in that average. Here all sites weigh the same.
    """
    number = context.args["numbers"].get(context.site, 1.0)  # a site not listed there adds 1
    context.log_metric("number", number)
    return TrainResult({"total": model["total"] + np.float32(number)}, examples=1)


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:  # noqa: ARG001 - the platform's signature
    """Runs at every site on the averaged model; `watch` in job.yml names one of the metrics."""
    return ValidateResult({"total": float(model["total"][0])}, examples=1)
