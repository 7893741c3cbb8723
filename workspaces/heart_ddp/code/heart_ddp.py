"""The job heart in PyTorch, on as many processes as the site was told to start."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from heart_data import FEATURES, Examples, load
from torch import distributed
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

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
    """Takes `local_updates` steps of minibatch SGD; each process has its share of every batch.

    With the same `batch_size` any number of processes comes to the same model, but for rounding.
    """
    module = LogisticRegression()
    load_arrays(module, model)
    device = join(context)
    module.to(device)
    # Averages the gradients of all processes in each backward pass.
    network = DistributedDataParallel(module) if context.world_size > 1 else module
    examples, _ = load(context.data["heart"])
    x, y = (tensor.to(device) for tensor in tensors(examples))
    optimizer = torch.optim.SGD(module.parameters(), lr=float(context.args["learning_rate"]))
    order = batches(len(y), int(context.args["batch_size"]), context)
    for _ in range(int(context.args["local_updates"])):
        mine = next(order).to(device)
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(network(x[mine]), y[mine]).backward()
        optimizer.step()
    # Every process has the same model now; what rank 0 returns is the site's update.
    return TrainResult(arrays_of(module.cpu()), len(examples.labels))


def validate(model: dict[str, np.ndarray], context: Context) -> ValidateResult:
    """Measures the model on the site's test rows; all processes do, and rank 0 is heard."""
    module = LogisticRegression()
    load_arrays(module, model)
    _, examples = load(context.data["heart"])
    x, y = tensors(examples)
    with torch.no_grad():
        logits = module(x)
    accuracy = ((logits > 0) == (y > 0)).double().mean().item()
    loss = binary_cross_entropy_with_logits(logits, y).item()
    return ValidateResult({"accuracy": accuracy, "loss": loss}, len(examples.labels))


def join(context: Context) -> torch.device:
    """Makes this process part of the site's group, once, and returns the device it works on."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(device)
    if context.world_size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpus else "gloo")
    return torch.device(device)


def batches(rows: int, size: int, context: Context) -> Iterator[torch.Tensor]:
    """Yields this process's rows of one batch after another, epoch after epoch.

    The task's seed orders the rows, the same at every process; what does not fill a batch waits
    for the next epoch.
    """
    generator = torch.Generator().manual_seed(context.seed)
    size = min(size, rows)
    size -= size % context.world_size  # equal shares, or the average would weigh rows unequally
    if not size:
        raise ValueError(f"a batch is smaller than {context.world_size} processes")
    while True:
        order = torch.randperm(rows, generator=generator)
        for start in range(0, rows - size + 1, size):
            yield order[start : start + size][context.rank :: context.world_size]


def tensors(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features float32 (rows, 13) and labels float32 (rows,)."""
    return torch.from_numpy(examples.features), torch.from_numpy(examples.labels)
