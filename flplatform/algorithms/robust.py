"""Robust aggregators: a few wrong or hostile updates cannot carry the model away.

They count every update alike, because the number of examples is what a site claims. Each bounds
the influence of `f` hostile sites only if its precondition on the number of updates holds, which
is refused at submission otherwise.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from flplatform.algorithms.aggregators import (
    AGGREGATORS,
    AggregatorArgs,
    Excluding,
    check_exact,
    mean_of,
)
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError, ModelFormatError
from flplatform.core.model import Array, Manifest
from flplatform.core.ports import Share, Statistic

__all__ = ["AGGREGATORS", "CoordinateMedian", "Krum", "TrimmedMean"]

STACK_ELEMENTS = 1 << 19
"""Numbers that are sorted at once, 4 MiB: own memory does not grow with the sites."""

Count = Annotated[int, Field(ge=0, le=100_000)]


def _demand(quorum: int, least: int, name: str, why: str) -> None:
    if quorum < least:
        raise InvalidArgumentError(
            f"{name} with {why} needs at least {least} updates, min_clients is {quorum}",
            field="aggregator",
            hint=f"raise min_clients to {least}, or lower the argument",
        )


class _Sorting(Excluding):
    """Takes each coordinate's middle values."""

    def _trim(self, count: int) -> int:
        """Return how many of `count` values to leave out at either end."""
        raise NotImplementedError

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], shares: Sequence[Share], out: Array
    ) -> None:
        """Write the mean of the middle values to `out`; see `ports.Aggregator`.

        Raises:
            FailedPreconditionError: too few updates hold the tensor.
            ModelFormatError: an integer is beyond 2^53, or the sum overflows.
        """
        del base, shares
        count = len(tiles)
        trim = self._trim(count)
        if count <= 2 * trim:
            raise FailedPreconditionError(
                f"{count} updates hold {name!r}; leaving {trim} out at either end needs more"
            )
        for tile in tiles:
            check_exact(tile, name)
        step = max(STACK_ELEMENTS // count, 1)
        stack = np.empty((count, min(step, out.size)))
        try:
            with np.errstate(over="raise", invalid="raise"):
                for start in range(0, out.size, step):
                    part = stack[:, : min(step, out.size - start)]
                    for row, tile in zip(part, tiles, strict=True):
                        row[:] = tile[start : start + step]
                    part.sort(axis=0)
                    middle = part[trim : count - trim]
                    target = out[start : start + step]
                    target[:] = middle[0]
                    for row in middle[1:]:
                        target += row
                    target /= len(middle)
        except FloatingPointError:
            raise ModelFormatError("the sum is not finite", field=f"update[{name!r}]") from None


class MedianArgs(AggregatorArgs):
    """Arguments of `median`."""


class CoordinateMedian(_Sorting):
    """Median of each coordinate, the mean of the two middle ones of an even number.

    Yin et al., 2018. As long as fewer than half of the updates are hostile, each coordinate stays
    between honest values. Integers are rounded half to even.
    """

    def __init__(self, args: MedianArgs) -> None:
        super().__init__(args.exclude_vars)

    def _trim(self, count: int) -> int:
        return (count - 1) // 2


class TrimmedMeanArgs(AggregatorArgs):
    """Arguments of `trimmed_mean`.

    Attributes:
        trim: how many of the smallest and of the largest values of each coordinate are left out.
    """

    trim: Count


class TrimmedMean(_Sorting):
    """Mean of each coordinate without its `trim` smallest and `trim` largest values.

    Yin et al., 2018. Up to `trim` hostile updates cannot move a coordinate beyond honest values.
    Needs more than 2 `trim` updates.
    """

    def __init__(self, args: TrimmedMeanArgs) -> None:
        super().__init__(args.exclude_vars)
        self._count = args.trim

    def check(self, manifest: Manifest, quorum: int) -> None:
        """Refuse a quorum of which nothing would be left.

        Raises:
            InvalidArgumentError: it is, or the model has no mean.
        """
        super().check(manifest, quorum)
        _demand(quorum, 2 * self._count + 1, "trimmed_mean", f"trim {self._count}")

    def _trim(self, count: int) -> int:  # noqa: ARG002 - it is given
        return self._count


class KrumArgs(AggregatorArgs):
    """Arguments of `krum` and `multi_krum`.

    Attributes:
        byzantine: how many updates may be hostile.
        select: of `multi_krum`, how many updates are averaged; default all but `byzantine` and 2.
    """

    byzantine: Count
    select: Annotated[int, Field(ge=1, le=100_000)] | None = None


class Krum(Excluding):
    """The update that lies closest to its neighbours, or the mean of the closest few.

    Blanchard et al., 2017. Each update's score is the sum of its squared distances to the
    n - f - 2 nearest others; the lowest scores are selected, the first in name order among equal
    ones. Needs n >= 2 f + 3 updates.

    Args:
        args: see `KrumArgs`.
        single: whether one update is selected.
    """

    statistic: Statistic = "distances"

    def __init__(self, args: KrumArgs, *, single: bool = True) -> None:
        super().__init__(args.exclude_vars)
        if single and args.select is not None:
            raise InvalidArgumentError(
                "krum selects one update", field="aggregator.args.select", hint="use multi_krum"
            )
        self._byzantine = args.byzantine
        self._select = 1 if single else args.select
        self._name = "krum" if single else "multi_krum"

    def check(self, manifest: Manifest, quorum: int) -> None:
        """Refuse a quorum that `byzantine` hostile updates could outweigh.

        Raises:
            InvalidArgumentError: it is, or more would be selected than can be trusted.
        """
        super().check(manifest, quorum)
        f = self._byzantine
        _demand(quorum, 2 * f + 3, self._name, f"byzantine {f}")
        if self._select is not None and self._select > quorum - f - 2:
            raise InvalidArgumentError(
                f"is {self._select}; with {quorum} updates, {f} of them hostile, "
                f"at most {quorum - f - 2} may be averaged",
                field="aggregator.args.select",
            )

    def judge(self, weights: Sequence[float], statistic: Array | None) -> list[Share]:
        """Give the selected updates weight 1 and the others 0.

        Raises:
            FailedPreconditionError: there are fewer than 2 f + 3 updates.
        """
        assert statistic is not None
        count, f = len(weights), self._byzantine
        if count < 2 * f + 3:
            raise FailedPreconditionError(
                f"{self._name} with byzantine {f} needs {2 * f + 3} updates, there are {count}"
            )
        nearest = np.sort(statistic + np.diag(np.full(count, np.inf)), axis=1)[:, : count - f - 2]
        scores = np.add.reduce(nearest, axis=1)
        select = count - f - 2 if self._select is None else self._select
        chosen = set(np.argsort(scores, kind="stable")[:select].tolist())
        return [Share(float(number in chosen)) for number in range(count)]

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], shares: Sequence[Share], out: Array
    ) -> None:
        """Write the mean of the selected updates to `out`; see `ports.Aggregator`.

        Raises:
            ModelFormatError: an integer is beyond 2^53.
        """
        chosen = [number for number, share in enumerate(shares) if share.weight]
        mean_of(
            name, base, [tiles[each] for each in chosen], [shares[each] for each in chosen], out
        )


AGGREGATORS.register("median", MedianArgs, CoordinateMedian)
AGGREGATORS.register("trimmed_mean", TrimmedMeanArgs, TrimmedMean)
AGGREGATORS.register("krum", KrumArgs, Krum)
AGGREGATORS.register("multi_krum", KrumArgs, lambda args: Krum(args, single=False))
