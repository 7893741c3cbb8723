"""Aggregation of a closed round: mapped updates in, one durable model out."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from flplatform.algorithms.recipes import recipe_of_round
from flplatform.algorithms.tiles import (
    Combiner,
    Outputs,
    Recipe,
    Tile,
    in_order,
    judge,
    measure,
    ranges,
)
from flplatform.core.errors import DataLossError, NotFoundError
from flplatform.core.events import Blob, RoundClosed, Target
from flplatform.core.messages import ModelRef
from flplatform.core.model import Array
from flplatform.core.ports import Contribution
from flplatform.files.modelfile import read_layout
from flplatform.files.modelwriter import NewModel, Places

T = TypeVar("T")

PARTS = 2
"""Threads that share one aggregation, the caller's included."""
TILES_BETWEEN_DROPS = 16
FROM_BACKUP = "put it back from a backup: its blobs folder has files of the same names"


class LostInputError(DataLossError):
    """A blob that a closed round names is not there."""


class ModelFiles(Protocol):
    """Where models are read and made; see `ports.BlobStore`."""

    def checked(self, digest: str) -> Path:
        """Return the file of a blob whose bytes are what they were."""

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Make a blob from a file that `fill` writes at the path it is given."""


class _MappedModel:
    """A model file, mapped, whose pages can be dropped behind the reader."""

    def __init__(self, path: Path) -> None:
        layout = read_layout(path)
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._places = Places(layout)
        self.manifest = layout.manifest
        self.arrays = layout.views(memoryview(self._mapping))

    def drop(self, tiles: Sequence[Tile]) -> None:
        """Let go of the whole pages between the first and the last of `tiles` that it holds.

        That they can be read again makes it harmless if other tensors lie there too.
        """
        mine = [tile for tile in tiles if tile.name in self.arrays]
        if not mine:
            return
        begin = self._places.of(mine[0].name, mine[0].start)
        begin += -begin % mmap.PAGESIZE
        length = self._places.of(mine[-1].name, mine[-1].stop) - begin
        if length >= mmap.PAGESIZE:
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, length - length % mmap.PAGESIZE)


def _mapped(blobs: ModelFiles, digest: str) -> _MappedModel:
    try:
        return _MappedModel(blobs.checked(digest))
    except NotFoundError as error:
        raise LostInputError(error.message, hint=FROM_BACKUP) from error


def aggregate_closed(
    blobs: ModelFiles, closed: RoundClosed, pool: Executor
) -> tuple[ModelRef, ModelRef | None]:
    """Combine what a `RoundClosed` names; see `aggregate_round`.

    Raises:
        FLError: this release does not know how, or as `aggregate_round`.
    """

    def ref(blob: Blob | Target) -> ModelRef:
        return ModelRef(blob.digest, blob.size)

    return aggregate_round(
        blobs,
        [(each.site, ref(each), each.weight) for each in closed.contributions],
        ref(closed.base),
        recipe_of_round(closed),
        pool,
        ref(closed.optimizer_state) if closed.optimizer_state else None,
    )


def aggregate_round(
    blobs: ModelFiles,
    closed: Iterable[tuple[str, ModelRef, float]],
    base: ModelRef,
    recipe: Recipe,
    pool: Executor,
    state: ModelRef | None = None,
) -> tuple[ModelRef, ModelRef | None]:
    """Combine a closed round's updates and store the result: the same arguments, the same digests.

    It blocks, and works in the calling thread too, so that it may itself run in `pool`.

    Args:
        blobs: holds the updates and the base model, and takes the result.
        closed: site, update and weight of each contribution, in any order.
        base: the round's model.
        recipe: how to combine.
        pool: threads that may help.
        state: of the recipe's optimiser before the round; None before its first.

    Returns:
        The new model, and the new state of the optimiser if there is one.

    Raises:
        LostInputError: a blob is missing.
        DataLossError: a blob is damaged.
        ModelFormatError: an update has a tensor that the base model does not have like this.
        ResourceExhaustedError: the disk is full.
        FLError: what the aggregator refuses.
    """
    base_model = _mapped(blobs, base.digest)
    models = [base_model]
    contributions = []
    for site, ref, weight in closed:
        model = _mapped(blobs, ref.digest)
        base_model.manifest.check_part(model.manifest, f"update of {site}")
        models.append(model)
        contributions.append(Contribution(site, weight, model.arrays))
    ordered = in_order(contributions)
    old_state = None
    if state is not None:
        old = _mapped(blobs, state.digest)
        recipe.state_manifest(base_model.manifest).check_same(old.manifest, "optimizer state")
        old_state = old.arrays
    parts = ranges(base_model.manifest, PARTS)

    def look(tiles: Sequence[Tile]) -> list[Array]:
        return [
            part
            for some in _steps(tiles, models)
            for part in measure(recipe, some, base_model.arrays, ordered)
        ]

    measured = _share(pool, look, parts) if recipe.aggregator.statistic else []
    shares = judge(recipe, ordered, chain.from_iterable(measured))
    new_model = NewModel(base_model.manifest)
    new_state = NewModel(recipe.state_manifest(base_model.manifest)) if recipe.optimizer else None
    outputs = Outputs(new_model.write, new_state.write if new_state else _nowhere)

    def work(tiles: Sequence[Tile]) -> None:
        combiner = Combiner(recipe, shares, base_model.arrays, ordered, outputs, old_state)
        for some in _steps(tiles, models):
            combiner.combine(some)

    def fill(path: Path) -> None:
        with new_model.open(path):
            _share(pool, work, parts)

    if new_state is None:
        return blobs.create(fill), None
    made: list[ModelRef] = []

    def fill_both(path: Path) -> None:
        with new_state.open(path):
            made.append(blobs.create(fill))

    state_ref = blobs.create(fill_both)
    return made[0], state_ref


def _nowhere(_name: str, _start: int, _values: Array) -> None:
    """Write nothing: there is no optimiser."""


def _steps(tiles: Sequence[Tile], models: Sequence[_MappedModel]) -> Iterator[Sequence[Tile]]:
    """Yield `tiles` a few at a time, and let go of their pages once they are done."""
    for start in range(0, len(tiles), TILES_BETWEEN_DROPS):
        some = tiles[start : start + TILES_BETWEEN_DROPS]
        yield some
        for model in models:
            model.drop(some)


def _share(
    pool: Executor, work: Callable[[Sequence[Tile]], T], parts: Sequence[Sequence[Tile]]
) -> list[T]:
    """Do all parts: the first here, the others in `pool` or, where it has no free thread, here.

    Returns:
        What `work` returned, in the order of the parts.
    """
    helpers = [(pool.submit(work, part), part) for part in parts[1:]]
    try:
        done = [work(part) for part in parts[:1]]
        for helper, part in helpers:
            done.append(work(part) if helper.cancel() else helper.result())
        return done
    finally:  # nobody may go on with what the caller is about to close
        wait([helper for helper, _ in helpers if not helper.cancel()])
