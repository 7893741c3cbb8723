"""Server optimisers: the change that a round brought is taken for a gradient.

Each keeps state tensors between rounds, in a model file of their own. Integers, bool tensors and
excluded ones are not touched. All arithmetic is elementwise in float64.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from flplatform.core.model import Array
from flplatform.core.plugins import Registry
from flplatform.core.ports import Optimizer
from flplatform.core.strict import Strict

Rate = Annotated[float, Field(gt=0, le=1e6)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class FedAvgMArgs(Strict):
    """Arguments of `fedavgm`.

    Attributes:
        learning_rate: factor on the accumulated change.
        momentum: how much of the accumulated change stays.
    """

    learning_rate: Rate = 1.0
    momentum: Decay = 0.9


class FedAvgM:
    """Momentum on the server (Hsu et al., 2019): v = momentum v + change, x = x + rate v."""

    def __init__(self, args: FedAvgMArgs) -> None:
        self._args = args
        self.slots = {"v": 0.0}

    def step(self, base: Array, mean: Array, slots: Sequence[Array]) -> None:
        """Move one tile; see `ports.Optimizer`."""
        (v,) = slots
        mean -= base
        v *= self._args.momentum
        v += mean
        np.multiply(v, self._args.learning_rate, out=mean)
        mean += base


class AdaptiveArgs(Strict):
    """Arguments of the adaptive optimisers; the defaults are those that their paper recommends.

    Attributes:
        learning_rate: how far one round moves the model.
        beta_1: how much of the mean change stays.
        beta_2: how much of the mean squared change stays; `fedadagrad` forgets nothing.
        tau: adaptivity, added to the root; the squares begin at its square.
    """

    learning_rate: Rate = 0.1
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    tau: Annotated[float, Field(gt=0, le=1e6)] = 1e-3


class FedAdagrad:
    """Adaptive federated optimisation (Reddi et al., 2021, algorithm 2).

    m = beta_1 m + (1 - beta_1) change; x = x + rate m / (sqrt(v) + tau); v, here, sums the squares.
    """

    def __init__(self, args: AdaptiveArgs) -> None:
        self._args = args
        self.slots = {"m": 0.0, "v": args.tau * args.tau}

    def step(self, base: Array, mean: Array, slots: Sequence[Array]) -> None:
        """Move one tile; see `ports.Optimizer`."""
        args, (m, v) = self._args, slots
        mean -= base
        square = mean * mean
        mean *= 1.0 - args.beta_1
        m *= args.beta_1
        m += mean
        self._accumulate(v, square)
        root = np.sqrt(v, out=square)
        root += args.tau
        np.divide(m, root, out=mean)
        mean *= args.learning_rate
        mean += base

    def _accumulate(self, v: Array, square: Array) -> None:
        """Take the squared change into `v`; `square` may be overwritten."""
        v += square


class FedAdam(FedAdagrad):
    """As `FedAdagrad`, with v = beta_2 v + (1 - beta_2) change squared."""

    def _accumulate(self, v: Array, square: Array) -> None:
        v *= self._args.beta_2
        square *= 1.0 - self._args.beta_2
        v += square


class FedYogi(FedAdagrad):
    """As `FedAdagrad`, with v = v - (1 - beta_2) change squared, signed by v - change squared."""

    def _accumulate(self, v: Array, square: Array) -> None:
        sign = np.sign(v - square)
        square *= 1.0 - self._args.beta_2
        square *= sign
        v -= square


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")
OPTIMIZERS.register("fedavgm", FedAvgMArgs, FedAvgM)
OPTIMIZERS.register("fedadagrad", AdaptiveArgs, FedAdagrad)
OPTIMIZERS.register("fedadam", AdaptiveArgs, FedAdam)
OPTIMIZERS.register("fedyogi", AdaptiveArgs, FedYogi)
