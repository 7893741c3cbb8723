"""Aggregation tile by tile: own memory of a few tiles, whatever the model and the sites."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flplatform.core.errors import InvalidArgumentError
from flplatform.core.model import DTYPES, Array, Arrays, Manifest
from flplatform.core.ports import Aggregator, Contribution

TILE_BYTES = 256 << 10
"""Size of a tile in bytes of the tensor's dtype: a few of them fit into a core's cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `stop` of a flattened tensor."""

    name: str
    start: int
    stop: int


def tiles_of(manifest: Manifest) -> list[Tile]:
    """Cut every tensor into tiles, in the order of the canonical file."""
    tiles = []
    for spec in manifest.tensors:
        itemsize = DTYPES[spec.dtype].itemsize
        step = TILE_BYTES // itemsize
        count = spec.size_bytes // itemsize
        for start in range(0, count, step):
            tiles.append(Tile(spec.name, start, min(start + step, count)))
    return tiles


def ranges(manifest: Manifest, parts: int) -> list[list[Tile]]:
    """Split the tiles of a model into at most `parts` runs of about equal bytes."""
    itemsizes = {spec.name: DTYPES[spec.dtype].itemsize for spec in manifest.tensors}
    groups: list[list[Tile]] = [[] for _ in range(parts)]
    done = 0
    for tile in tiles_of(manifest):
        groups[done * parts // manifest.size_bytes].append(tile)
        done += (tile.stop - tile.start) * itemsizes[tile.name]
    return [group for group in groups if group]


def in_order(contributions: Iterable[Contribution]) -> list[Contribution]:
    """Return the contributions in site-name order, the one order in which they are combined.

    Raises:
        InvalidArgumentError: there are none, or a site has two.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.site)
    if not ordered:
        raise InvalidArgumentError("there is no update to combine", field="contributions")
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.site == other.site:
            raise InvalidArgumentError(f"site {one.site} has two updates", field="contributions")
    return ordered


def aggregate_range(
    aggregator: Aggregator,
    tiles: Iterable[Tile],
    base: Arrays,
    contributions: Sequence[Contribution],
    write: Callable[[Tile, Array], None],
) -> None:
    """Combine `tiles` and hand each to `write`, in order.

    Args:
        aggregator: how to combine.
        tiles: what to combine; ranges that share no tile may run side by side.
        base: the round's model.
        contributions: as `in_order` returned them; every tensor has the dtype and shape that it
            has in `base` and is contiguous.
        write: takes a tile and its result, a flat array that is reused for the next tile.

    Raises:
        FLError: what the aggregator refuses.
    """
    weights = [contribution.weight for contribution in contributions]
    buffer = np.empty(TILE_BYTES, np.uint8)
    for tile in tiles:
        cut = slice(tile.start, tile.stop)
        own = base[tile.name].reshape(-1)[cut]
        theirs = [each.arrays[tile.name].reshape(-1)[cut] for each in contributions]
        out = buffer[: own.nbytes].view(own.dtype)
        aggregator.combine(tile.name, own, theirs, weights, out)
        write(tile, out)


def aggregate(
    aggregator: Aggregator, base: Arrays, contributions: Iterable[Contribution]
) -> dict[str, Array]:
    """Combine in memory: the same bytes as by ranges into a file.

    Args:
        aggregator: how to combine.
        base: the round's model.
        contributions: in any order; the same tensors as `base`.

    Raises:
        FLError: what `in_order` or the aggregator refuses.
    """
    result = {name: np.empty(array.shape, array.dtype) for name, array in base.items()}

    def write(tile: Tile, values: Array) -> None:
        result[tile.name].reshape(-1)[tile.start : tile.stop] = values

    tiles = tiles_of(Manifest.of(base))
    aggregate_range(aggregator, tiles, base, in_order(contributions), write)
    return result
