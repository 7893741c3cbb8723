"""Logistic regression on UCI heart disease, in NumPy: what a site runs in each round.

The model is that of torch's `Linear(13, 1)`: "linear.weight" float32 (1, 13) and "linear.bias"
float32 (1,). Loss, optimiser and schedule are those of FLamby's Fed-Heart-Disease benchmark.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from heart_data import FEATURES, load

from flplatform.client.api import Context, TrainResult, ValidateResult


def initial_model(args: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:  # noqa: ARG001 - the platform's signature
    """Draws what torch draws for `Linear(13, 1)` after `manual_seed(seed)`, bit for bit.

    So a run starts where FLamby's published run of the same seed started: uniformly within
    ±1/sqrt(inputs).
    """
    inputs = len(FEATURES)
    # Both libraries have the Mersenne Twister; torch uses the low 24 bits of each output.
    twister = np.random.RandomState(seed % 2**32)
    draws = twister.randint(0, 2**32, inputs + 1, dtype=np.uint32) & 0xFFFFFF
    bound = float(np.float32(1 / np.sqrt(inputs)))
    values = (draws * (2 * bound / 2**24) - bound).astype(np.float32)
    return {"linear.weight": values[np.newaxis, :inputs], "linear.bias": values[inputs:]}


def train(model: dict[str, np.ndarray], context: Context) -> TrainResult:
    """Takes `local_updates` steps of minibatch SGD from the model it is given."""
    examples, _ = load(context.data["heart"])
    rate, updates = float(context.args["learning_rate"]), int(context.args["local_updates"])
    weight, bias = model["linear.weight"][0].copy(), model["linear.bias"].copy()
    rng = np.random.default_rng(context.seed)
    losses = []
    for rows in batches(len(examples.labels), int(context.args["batch_size"]), updates, rng):
        x, y = examples.features[rows], examples.labels[rows]
        logits = x @ weight + bias
        losses.append(cross_entropy(logits, y))
        # The gradient of the mean cross-entropy by the logits is (probability - label) / rows;
        # tanh is the form of the sigmoid that cannot overflow.
        gradient = (0.5 * (1 + np.tanh(logits / 2)) - y) / len(y)
        weight -= rate * (gradient @ x)
        bias -= rate * gradient.sum()
    update = {"linear.weight": weight[np.newaxis], "linear.bias": bias}
    return TrainResult(update, len(examples.labels), {"train_loss": float(np.mean(losses))})


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:
    """Measures the model on the site's test rows."""
    _, examples = load(context.data["heart"])
    logits = examples.features @ model["linear.weight"][0] + model["linear.bias"]
    # A probability above one half is a logit above zero.
    accuracy = np.mean((logits > 0) == (examples.labels > 0))
    loss = cross_entropy(logits, examples.labels)
    return ValidateResult({"accuracy": float(accuracy), "loss": loss}, len(examples.labels))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean binary cross-entropy of float32 (rows,) logits and labels."""
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def batches(rows: int, size: int, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields `count` batches of row numbers, each int64 (at most `size`,).

    Epoch follows epoch, each in a new order; an epoch's last batch may be short.
    """

    def endless() -> Iterator[np.ndarray]:
        while True:
            order = rng.permutation(rows)
            yield from (order[start : start + size] for start in range(0, rows, size))

    return itertools.islice(endless(), count)
