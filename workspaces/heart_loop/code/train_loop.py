"""The job heart again, as a script with a loop of its own instead of functions.

This style fits code that already has a main loop: ask for a task, work, send, ask again.
"""

import numpy as np
from heart_data import Examples, load

from flplatform.client.api import Context, TrainResult, ValidateResult, receive, send


def logits_of(model: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
    """Returns the logits, float32 (rows,)."""
    logits: np.ndarray = features @ model["linear.weight"][0] + model["linear.bias"]
    return logits


def train(model: dict[str, np.ndarray], rows: Examples, context: Context) -> TrainResult:
    """Takes `local_updates` steps of minibatch SGD, epoch after epoch."""
    model = {name: array.copy() for name, array in model.items()}
    rate, size = float(context.args["learning_rate"]), int(context.args["batch_size"])
    rng = np.random.default_rng(context.seed)
    batches: list[np.ndarray] = []
    for _ in range(int(context.args["local_updates"])):
        if not batches:
            order = rng.permutation(len(rows.labels))
            batches = [order[start : start + size] for start in range(0, len(order), size)]
        batch = batches.pop(0)
        x, y = rows.features[batch], rows.labels[batch]
        gradient = (0.5 * (1 + np.tanh(logits_of(model, x) / 2)) - y) / len(y)
        model["linear.weight"] -= rate * (gradient @ x)
        model["linear.bias"] -= rate * gradient.sum()
    return TrainResult(model, len(rows.labels))


def validate(model: dict[str, np.ndarray], rows: Examples) -> ValidateResult:
    """Measures accuracy and mean cross-entropy."""
    logits = logits_of(model, rows.features)
    metrics = {
        "accuracy": float(np.mean((logits > 0) == (rows.labels > 0))),
        "loss": float(np.mean(np.logaddexp(0, logits) - rows.labels * logits)),
    }
    return ValidateResult(metrics, len(rows.labels))


def main() -> None:
    while (task := receive()) is not None:
        train_rows, test_rows = load(task.context.data["heart"])
        if task.kind == "train":
            send(train(task.model, train_rows, task.context))
        else:
            send(validate(task.model, test_rows))


if __name__ == "__main__":
    main()
