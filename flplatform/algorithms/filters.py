"""Filters: what a site's own policy changes in a result before it leaves. Pure functions."""

import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from flplatform.algorithms.aggregators import NamePattern, matches
from flplatform.core.errors import ModelFormatError
from flplatform.core.model import Array, Arrays, is_float
from flplatform.core.plugins import Registry
from flplatform.core.ports import Filter
from flplatform.core.strict import Strict

BLOCK = 1 << 15
"""Elements per block of a reduction: a fixed size, so that sums do not depend on the machine."""


class ExcludeVarsArgs(Strict):
    """Arguments of `exclude_vars`: tensors whose name contains a match of `pattern` stay here."""

    pattern: NamePattern = Field(min_length=1)


class ExcludeVars:
    """Sends matching tensors as they were received: what was learnt in them stays at the site."""

    def __init__(self, args: ExcludeVarsArgs) -> None:
        self._pattern = args.pattern

    def __call__(self, arrays: Arrays, received: Arrays) -> dict[str, Array]:
        """Return `arrays` with the matching tensors taken from `received`."""
        return {
            name: received[name] if matches(self._pattern, name) else array
            for name, array in arrays.items()
        }


class ClipNormArgs(Strict):
    """Arguments of `clip_norm`: the bound on the change's L2 norm."""

    max_norm: Annotated[float, Field(gt=0)]


class ClipNorm:
    """Scales the change down so that its L2 norm over all float tensors is at most `max_norm`.

    The norm is taken in float64 over blocks in name order (McMahan et al., 2018: flat clipping).
    Rounding to the tensor's dtype goes towards the received value, never beyond the bound.
    Tensors that are not float are sent as they are.
    """

    def __init__(self, args: ClipNormArgs) -> None:
        self._max_norm = args.max_norm

    def __call__(self, arrays: Arrays, received: Arrays) -> dict[str, Array]:
        """Return the clipped arrays; the same ones if the change is within the bound.

        Raises:
            ModelFormatError: the norm of the change is not finite.
        """
        result = dict(arrays)
        floats = [name for name in sorted(arrays) if is_float(arrays[name].dtype)]
        with np.errstate(over="ignore", invalid="ignore"):
            squares = 0.0
            for name in floats:
                for _, old, new in _blocks(received[name], arrays[name]):
                    delta = new - old
                    squares += float(np.add.reduce(delta * delta))
        norm = math.sqrt(squares)
        if not math.isfinite(norm):
            raise ModelFormatError(
                f"the norm of the change is {norm}", field="update", rule="clip_norm"
            )
        if norm > self._max_norm:
            for name in floats:
                result[name] = _scaled(received[name], arrays[name], self._max_norm / norm)
        return result


def _blocks(received: Array, trained: Array) -> Iterator[tuple[slice, Array, Array]]:
    """Yield both tensors in flat float64 blocks."""
    flat_received, flat_trained = received.reshape(-1), trained.reshape(-1)
    for start in range(0, flat_trained.size, BLOCK):
        cut = slice(start, start + BLOCK)
        yield cut, flat_received[cut].astype(np.float64), flat_trained[cut].astype(np.float64)


def _scaled(received: Array, trained: Array, factor: float) -> Array:
    result = np.empty(trained.size, trained.dtype)
    for cut, old, new in _blocks(received, trained):
        step = (new - old) * factor
        rounded = (old + step).astype(trained.dtype)
        beyond = np.abs(rounded.astype(np.float64) - old) > np.abs(step)
        towards = received.reshape(-1)[cut]
        result[cut] = np.where(beyond, np.nextafter(rounded, towards), rounded)
    return result.reshape(trained.shape)


FILTERS: Registry[Filter] = Registry("filter")
FILTERS.register("exclude_vars", ExcludeVarsArgs, ExcludeVars)
FILTERS.register("clip_norm", ClipNormArgs, ClipNorm)
