"""Aggregators: how updates become a model. Chosen by name; pure functions of values.

Kernels use elementwise IEEE operations only (`+ - * /`, rounding, casts), one after the other in
site-name order: the bytes of the result depend on neither the machine nor the order of arrival.
"""

import re
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import Array, Manifest, is_float
from flplatform.core.plugins import Registry
from flplatform.core.ports import Aggregator, Share, Statistic
from flplatform.core.strict import Strict

MAX_EXACT_INTEGER = 1 << 53
"""Largest magnitude up to which float64 holds every integer."""


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r:.80} is not a regular expression: {error}") from None
    return pattern


NamePattern = Annotated[str, Field(max_length=1000), AfterValidator(_check_pattern)]
"""A regular expression, searched for anywhere in a tensor's name; empty matches no tensor."""


def matches(pattern: str, name: str) -> bool:
    """Return whether a `NamePattern` is found in the tensor name `name`."""
    return pattern != "" and re.search(pattern, name) is not None


class AggregatorArgs(Strict):
    """Arguments that every aggregator has.

    Attributes:
        exclude_vars: tensors whose name contains a match keep the value of the round's model.
    """

    exclude_vars: NamePattern = ""


class Excluding:
    """What aggregators have in common: tensors left out, no statistic, equal weights.

    Args:
        exclude_vars: see `AggregatorArgs`.
    """

    statistic: Statistic = ""

    def __init__(self, exclude_vars: str) -> None:
        self._exclude_vars = exclude_vars

    def excludes(self, name: str) -> bool:
        """Return whether a tensor keeps the value that it has in the round's model."""
        return matches(self._exclude_vars, name)

    def weight_of(self, site: str, examples: int) -> float:  # noqa: ARG002 - all count alike
        """Return 1: every update counts alike, whatever its site claims of its examples."""
        return 1.0

    def judge(self, weights: Sequence[float], statistic: Array | None) -> list[Share]:  # noqa: ARG002
        """Return the weights as they are."""
        return [Share(weight) for weight in weights]

    def check(self, manifest: Manifest, quorum: int) -> None:  # noqa: ARG002 - any number will do
        """Refuse a model whose tensors cannot be combined.

        Raises:
            InvalidArgumentError: a bool tensor is not excluded, or every tensor is.
        """
        kept = [spec for spec in manifest.tensors if not self.excludes(spec.name)]
        if not kept:
            raise InvalidArgumentError(
                f"{self._exclude_vars!r} matches every tensor: nothing would be learnt",
                field="aggregator.args.exclude_vars",
            )
        for spec in kept:
            if spec.dtype == "BOOL":
                raise InvalidArgumentError(
                    "a bool tensor has no mean",
                    field=f"model[{spec.name!r}]",
                    hint="name it in the aggregator's exclude_vars",
                )


class WeightedMeanArgs(AggregatorArgs):
    """Arguments of `weighted_mean`.

    Attributes:
        site_weights: factor on a site's number of examples; 1 for a site that is not named.
        max_norm: bound on the L2 norm of each update's change; a larger one is scaled down.
    """

    site_weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}
    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class WeightedMean(Excluding):
    """Mean of the updates, weighted by examples (FedAvg: McMahan et al., 2017).

    Accumulated in float64 and divided once. With `max_norm` no update moves the model further
    than that before averaging (norm clipping: Sun et al., 2019), so that one site's influence is
    bounded by its weight times `max_norm`. Integers are not clipped; their magnitude must not
    exceed 2^53. Bool tensors have no mean and must be excluded.
    """

    def __init__(self, args: WeightedMeanArgs) -> None:
        super().__init__(args.exclude_vars)
        self._site_weights = args.site_weights
        self._max_norm = args.max_norm
        self.statistic = "" if args.max_norm is None else "norms"

    def weight_of(self, site: str, examples: int) -> float:
        """Return examples times the site's factor."""
        return examples * self._site_weights.get(site, 1.0)

    def judge(self, weights: Sequence[float], statistic: Array | None) -> list[Share]:
        """Scale down what is beyond `max_norm`; an infinite norm leaves nothing of the change."""
        if self._max_norm is None or statistic is None:
            return super().judge(weights, statistic)
        with np.errstate(divide="ignore"):
            scales = np.minimum(self._max_norm / np.sqrt(statistic), 1.0)
        return [Share(*pair) for pair in zip(weights, scales.tolist(), strict=True)]

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], shares: Sequence[Share], out: Array
    ) -> None:
        """Write the weighted mean of `tiles` to `out`; see `ports.Aggregator`.

        Raises:
            InvalidArgumentError: the weights have no positive, finite sum.
            ModelFormatError: an integer is beyond 2^53, or the sum overflows.
        """
        mean_of(name, base, tiles, shares, out)


def mean_of(
    name: str, base: Array, tiles: Sequence[Array], shares: Sequence[Share], out: Array
) -> None:
    """Write the mean of `tiles`, weighted and scaled by `shares`, to the float64 array `out`.

    Raises:
        InvalidArgumentError: the weights have no positive, finite sum.
        ModelFormatError: an integer is beyond 2^53, or the sum overflows.
    """
    total = 0.0  # not sum(): newer Pythons compensate it
    for share in shares:
        total += share.weight
    if not 0.0 < total < float("inf"):
        raise InvalidArgumentError(
            f"the weights of all updates add up to {total}",
            field="weights",
            hint="a site needs examples and a positive factor in site_weights",
        )
    term = np.empty_like(out) if len(tiles) > 1 else out
    clipped = is_float(base.dtype)
    try:
        with np.errstate(over="raise", invalid="raise"):
            for number, (tile, share) in enumerate(zip(tiles, shares, strict=True)):
                check_exact(tile, name)
                target = term if number else out
                if share.scale == 1.0 or not clipped:
                    target[:] = tile
                else:
                    _scale(base, tile, share.scale, target)
                target *= share.weight
                if number:
                    out += term
            out /= total
    except FloatingPointError:
        raise ModelFormatError(
            "the weighted sum is not finite", field=f"update[{name!r}]"
        ) from None


def _scale(base: Array, tile: Array, scale: float, target: Array) -> None:
    """Write the base and `scale` of the way from there to `tile`."""
    target[:] = base
    if scale > 0.0:
        target += (tile.astype(np.float64) - target) * scale


def check_exact(tile: Array, name: str) -> None:
    """Refuse integers that float64 does not hold.

    Raises:
        ModelFormatError: one is beyond 2^53.
    """
    if tile.dtype.kind not in "iu" or tile.itemsize < 8:
        return
    low, high = tile.min(initial=0), tile.max(initial=0)
    if low < -MAX_EXACT_INTEGER or high > MAX_EXACT_INTEGER:
        raise ModelFormatError(
            "holds an integer beyond 2^53, which has no exact mean",
            field=f"update[{name!r}]",
            hint="name the tensor in the aggregator's exclude_vars",
        )


AGGREGATORS: Registry[Aggregator] = Registry("aggregator")
AGGREGATORS.register("weighted_mean", WeightedMeanArgs, WeightedMean)
