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
from flplatform.core.model import Array, Manifest
from flplatform.core.plugins import Registry
from flplatform.core.ports import Aggregator
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


class WeightedMeanArgs(Strict):
    """Arguments of `weighted_mean`.

    Attributes:
        exclude_vars: tensors whose name contains a match keep the value of the round's model.
        site_weights: factor on a site's number of examples; 1 for a site that is not named.
    """

    exclude_vars: NamePattern = ""
    site_weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = {}


class WeightedMean:
    """Mean of the updates, weighted by examples (FedAvg: McMahan et al., 2017).

    Accumulated in float64 and divided once. Integers are rounded half to even; their magnitude
    must not exceed 2^53. Bool tensors have no mean and must be excluded.
    """

    def __init__(self, args: WeightedMeanArgs) -> None:
        self._exclude_vars = args.exclude_vars
        self._site_weights = args.site_weights

    def check(self, manifest: Manifest, quorum: int) -> None:  # noqa: ARG002 - any number will do
        """Refuse a model that has no mean.

        Raises:
            InvalidArgumentError: a bool tensor is not excluded, or every tensor is.
        """
        kept = [spec for spec in manifest.tensors if not matches(self._exclude_vars, spec.name)]
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

    def weight_of(self, site: str, examples: int) -> float:
        """Return examples times the site's factor."""
        return examples * self._site_weights.get(site, 1.0)

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], weights: Sequence[float], out: Array
    ) -> None:
        """Write the weighted mean of `tiles` to `out`; see `ports.Aggregator`.

        Raises:
            InvalidArgumentError: the weights have no positive, finite sum.
            ModelFormatError: an integer is beyond 2^53, or the sum overflows.
        """
        if matches(self._exclude_vars, name):
            out[:] = base
            return
        total = 0.0  # not sum(): newer Pythons compensate it
        for weight in weights:
            total += weight
        if not 0.0 < total < float("inf"):
            raise InvalidArgumentError(
                f"the weights of all updates add up to {total}",
                field="weights",
                hint="a site needs examples and a positive factor in site_weights",
            )
        mean, term = np.empty((2, out.size))
        try:
            with np.errstate(over="raise", invalid="raise"):
                for number, (tile, weight) in enumerate(zip(tiles, weights, strict=True)):
                    _check_exact(tile, name)
                    target = term if number else mean
                    target[:] = tile
                    target *= weight
                    if number:
                        mean += term
                mean /= total
                out[:] = np.rint(mean, out=mean) if out.dtype.kind in "iu" else mean
        except FloatingPointError:
            raise ModelFormatError(
                "the weighted sum is not finite", field=f"update[{name!r}]"
            ) from None


def _check_exact(tile: Array, name: str) -> None:
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
