"""Aggregation tile by tile: own memory of a few tiles, whatever the model and the sites.

A closed round becomes a model in two passes at most: `measure`, where the aggregator wants to
know something of whole updates, and `aggregate_range`. Both may run over parts of the tiles side
by side; their results depend neither on the threads nor on the order of arrival.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import DTYPES, Array, Arrays, Manifest, TensorSpec, is_float
from flplatform.core.ports import Aggregator, Contribution, Optimizer, Share

TILE_BYTES = 256 << 10
"""Size of a tile in bytes of the tensor's dtype: a few of them fit into a core's cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `stop` of a flattened tensor."""

    name: str
    start: int
    stop: int

    @property
    def cut(self) -> slice:
        """The elements."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How updates become a model.

    Attributes:
        aggregator: combines them.
        delta: whether updates are changes of the round's model instead of models.
        optimizer: moves the model by the combined change; without one it moves all the way.
    """

    aggregator: Aggregator
    delta: bool = False
    optimizer: Optimizer | None = None

    def check(self, manifest: Manifest, quorum: int) -> None:
        """Refuse what cannot work, at submission.

        Raises:
            InvalidArgumentError: names the precondition.
            ModelFormatError: the optimiser's state would be no model file.
        """
        self.aggregator.check(manifest, quorum)
        if self.delta:
            for spec in manifest.tensors:
                if spec.dtype in ("U8", "BOOL") and not self.aggregator.excludes(spec.name):
                    raise InvalidArgumentError(
                        f"a {spec.dtype} tensor has no change that could be negative",
                        field=f"model[{spec.name!r}]",
                        hint="name it in the aggregator's exclude_vars, or send full updates",
                    )
        if self.optimizer is not None:
            self.state_manifest(manifest).file_bytes()

    def state_manifest(self, manifest: Manifest) -> Manifest:
        """Return the tensors of the optimiser's state: `slot/name`, in name order.

        float32, but float64 for a float64 tensor.

        Raises:
            InvalidArgumentError: the model has no float tensor to optimise.
        """
        assert self.optimizer is not None
        specs = [
            TensorSpec(f"{slot}/{spec.name}", "F64" if spec.dtype == "F64" else "F32", spec.shape)
            for slot in sorted(self.optimizer.slots)
            for spec in manifest.tensors
            if is_float(DTYPES[spec.dtype]) and not self.aggregator.excludes(spec.name)
        ]
        if not specs:
            raise InvalidArgumentError(
                "the model has no float tensor that it could move", field="optimizer"
            )
        return Manifest(tuple(specs))


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


def measure(
    recipe: Recipe, tiles: Sequence[Tile], base: Arrays, contributions: Sequence[Contribution]
) -> list[Array]:
    """Return each tile's part of what the recipe's aggregator wants to know; see `ports.Statistic`.

    Parts are added up by `judge` in the order of the tiles, so that it does not matter who has
    measured which. A tensor that a contribution lacks has not changed there.

    Args:
        recipe: how to combine.
        tiles: what to look at.
        base: the round's model.
        contributions: as `in_order` returned them.
    """
    kind, count = recipe.aggregator.statistic, len(contributions)
    parts = []
    for tile in tiles:
        own = base[tile.name].reshape(-1)[tile.cut]
        if not kind or recipe.aggregator.excludes(tile.name) or not is_float(own.dtype):
            continue
        with np.errstate(over="ignore"):  # what is infinitely far away may be said to be so
            origin = np.zeros(own.size) if recipe.delta else own.astype(np.float64)
            changes = [
                each.arrays[tile.name].reshape(-1)[tile.cut] - origin
                for each in contributions
                if tile.name in each.arrays
            ]
            if kind == "norms":
                found = iter([_squares(change) for change in changes])
                part = np.array(
                    [next(found) if tile.name in each.arrays else 0.0 for each in contributions]
                )
            else:
                part = np.zeros((count, count))
                for row in range(count):
                    for column in range(row):
                        part[row, column] = _squares(changes[row] - changes[column])
                part += part.T
        parts.append(part)
    return parts


def _squares(values: Array) -> float:
    return float(np.add.reduce(values * values))


def judge(
    recipe: Recipe, contributions: Sequence[Contribution], parts: Iterable[Array]
) -> list[Share]:
    """Decide what each contribution counts for.

    Args:
        recipe: how to combine.
        contributions: as `in_order` returned them.
        parts: what `measure` returned for all tiles, in their order.

    Raises:
        FLError: what the aggregator refuses.
    """
    weights, count = [each.weight for each in contributions], len(contributions)
    kind = recipe.aggregator.statistic
    if not kind:
        return recipe.aggregator.judge(weights, None)
    total = np.zeros(count if kind == "norms" else (count, count))
    for part in parts:
        total += part
    return recipe.aggregator.judge(weights, total)


Write = Callable[[str, int, Array], None]
"""Takes a tensor's name, the first element, and flat values that are reused for the next tile."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go.

    Attributes:
        model: takes the new model.
        state: takes the optimiser's new state.
    """

    model: Write
    state: Write


class Combiner:
    """Combines tiles of a round one after the other; the work of one thread.

    Args:
        recipe: how to combine.
        shares: what `judge` said of the contributions.
        base: the round's model.
        contributions: as `in_order` returned them; every tensor has the dtype and shape that it
            has in `base` and is contiguous. A tensor that none of them holds stays as it is.
        outputs: takes the results.
        state: of the optimiser before the round; None before its first.
    """

    def __init__(
        self,
        recipe: Recipe,
        shares: Sequence[Share],
        base: Arrays,
        contributions: Sequence[Contribution],
        outputs: Outputs,
        state: Arrays | None = None,
    ) -> None:
        self._recipe = recipe
        self._shares = shares
        self._base = base
        self._contributions = contributions
        self._outputs = outputs
        self._state = state
        # Reused from tile to tile: fresh memory would cost more than the arithmetic on it.
        self._wide = np.empty((0, 0))
        self._narrow = np.empty(0, np.uint8)

    def combine(self, tiles: Sequence[Tile]) -> None:
        """Combine `tiles` and hand each to the outputs, in order.

        Raises:
            ModelFormatError: a result is beyond its tensor's dtype.
            FLError: what the aggregator refuses.
        """
        optimizer = self._recipe.optimizer
        rows = 2 + (len(optimizer.slots) if optimizer else 0)
        largest = max((tile.stop - tile.start for tile in tiles), default=0)
        if self._wide.shape[0] * self._wide.shape[1] < rows * largest:
            self._wide = np.empty((rows, largest))
            self._narrow = np.empty(largest * self._wide.itemsize, np.uint8)
        for tile in tiles:
            self._combine(tile)

    def _combine(self, tile: Tile) -> None:
        own = self._base[tile.name].reshape(-1)[tile.cut]
        mean, base, *slots = (row[: own.size] for row in self._wide)
        excluded = self._recipe.aggregator.excludes(tile.name)
        changed = not excluded and self._mean(tile, own, mean, base)
        if not excluded and is_float(own.dtype):
            self._optimise(tile, base, mean, slots, changed=changed)
        result = self._rounded(tile.name, mean, own.dtype) if changed else own
        self._outputs.model(tile.name, tile.start, result)

    def _mean(self, tile: Tile, own: Array, mean: Array, base: Array) -> bool:
        """Write the combination and the base in float64; return whether anybody sent the tensor."""
        recipe, found = self._recipe, []
        for each, share in zip(self._contributions, self._shares, strict=True):
            if (array := each.arrays.get(tile.name)) is not None:
                found.append((array.reshape(-1)[tile.cut], share))
        if not found:
            return False
        origin = np.zeros_like(own) if recipe.delta else own
        tiles, shares = zip(*found, strict=True)
        recipe.aggregator.combine(tile.name, origin, tiles, shares, mean)
        if recipe.delta or recipe.optimizer:
            base[:] = own
        if recipe.delta:
            with np.errstate(over="ignore"):  # `_rounded` looks at the sum
                mean += base
        return True

    def _optimise(
        self, tile: Tile, base: Array, mean: Array, slots: Sequence[Array], *, changed: bool
    ) -> None:
        """Let the optimiser move `mean`, and hand its state on."""
        optimizer = self._recipe.optimizer
        if optimizer is None:
            return
        names = [f"{slot}/{tile.name}" for slot in optimizer.slots]
        for name, row, value in zip(names, slots, optimizer.slots.values(), strict=True):
            row[:] = value if self._state is None else self._state[name].reshape(-1)[tile.cut]
        if changed:
            with np.errstate(over="ignore", invalid="ignore"):  # `_rounded` looks at the results
                optimizer.step(base, mean, slots)
        wide = self._base[tile.name].dtype == np.float64
        for name, row in zip(names, slots, strict=True):
            values = self._rounded(name, row, np.dtype(np.float64 if wide else np.float32))
            self._outputs.state(name, tile.start, values)

    def _rounded(self, name: str, values: Array, dtype: np.dtype[np.generic]) -> Array:
        """Return float64 values in a tensor's dtype; integers half to even.

        Raises:
            ModelFormatError: one is beyond the dtype.
        """
        out = self._narrow[: values.size * dtype.itemsize].view(dtype)
        try:
            with np.errstate(over="raise", invalid="raise"):
                if dtype.kind in "iu":
                    np.rint(values, out=values)
                    limits = np.iinfo(dtype.str)
                    fits = (
                        limits.min <= values.min(initial=0) <= values.max(initial=0) <= limits.max
                    )
                else:
                    fits = bool(np.isfinite(values).all())
                if fits:
                    out[:] = values
                    return out
        except FloatingPointError:
            pass
        raise ModelFormatError(f"a result is beyond {dtype.name}", field=f"model[{name!r}]")


def aggregate(
    recipe: Recipe,
    base: Arrays,
    contributions: Iterable[Contribution],
    state: Arrays | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Combine in memory: the same bytes as by ranges into a file.

    Args:
        recipe: how to combine.
        base: the round's model.
        contributions: in any order; of the tensors of `base`.
        state: of the optimiser before the round; None before its first.

    Returns:
        The model and the optimiser's new state, empty without one.

    Raises:
        FLError: what `in_order` or the aggregator refuses.
    """
    manifest, ordered = Manifest.of(base), in_order(contributions)
    model = {name: np.empty(array.shape, array.dtype) for name, array in base.items()}
    states: dict[str, Array] = {}
    if recipe.optimizer is not None:
        specs = recipe.state_manifest(manifest).tensors
        states = {spec.name: np.empty(spec.shape, DTYPES[spec.dtype]) for spec in specs}

    def into(arrays: Arrays) -> Write:
        def write(name: str, start: int, values: Array) -> None:
            arrays[name].reshape(-1)[start : start + values.size] = values

        return write

    tiles = tiles_of(manifest)
    shares = judge(recipe, ordered, measure(recipe, tiles, base, ordered))
    Combiner(recipe, shares, base, ordered, Outputs(into(model), into(states)), state).combine(
        tiles
    )
    return model, states
