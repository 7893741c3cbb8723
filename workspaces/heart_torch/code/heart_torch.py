"""The job heart in PyTorch."""

import itertools

import numpy as np
import torch
from heart_data import FEATURES, Examples, load
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from flplatform.client.api import Context, TrainResult, ValidateResult
from flplatform.frameworks.torch import arrays_of, load_arrays


class LogisticRegression(torch.nn.Module):
    """13 features in, one logit out; its tensors are "linear.weight" and "linear.bias"."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(len(FEATURES), 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps float32 (rows, 13) to float32 (rows,)."""
        return self.linear(features).squeeze(1)


def train(model: dict[str, np.ndarray], context: Context) -> TrainResult:
    """Takes `local_updates` steps of minibatch SGD from the model it is given."""
    module = LogisticRegression()
    load_arrays(module, model)
    examples, _ = load(context.data["heart"])
    # The task's seed orders the batches: the same task gives the same update, bit for bit.
    generator = torch.Generator().manual_seed(context.seed)
    loader = DataLoader(
        tensors(examples),
        batch_size=int(context.args["batch_size"]),
        shuffle=True,
        generator=generator,
    )
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.SGD(module.parameters(), lr=float(context.args["learning_rate"]))
    for x, y in itertools.islice(epochs, int(context.args["local_updates"])):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(module(x), y).backward()
        optimizer.step()
    return TrainResult(arrays_of(module), len(examples.labels))


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:
    """Measures the model on the site's test rows."""
    module = LogisticRegression()
    load_arrays(module, model)
    _, examples = load(context.data["heart"])
    x, y = tensors(examples).tensors
    with torch.no_grad():
        logits = module(x)
    accuracy = ((logits > 0) == (y > 0)).double().mean().item()
    loss = binary_cross_entropy_with_logits(logits, y).item()
    return ValidateResult({"accuracy": accuracy, "loss": loss}, len(examples.labels))


def tensors(examples: Examples) -> TensorDataset:
    """Returns features float32 (rows, 13) and labels float32 (rows,)."""
    return TensorDataset(torch.from_numpy(examples.features), torch.from_numpy(examples.labels))
