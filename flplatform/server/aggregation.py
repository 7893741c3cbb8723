"""Aggregation of a closed round: mapped updates in, one durable model out."""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, wait
from pathlib import Path

from flplatform.algorithms.tiles import Tile, aggregate_range, in_order, ranges
from flplatform.core.messages import ModelRef
from flplatform.core.model import DTYPES, Array, Layout, encode_header, parse_header
from flplatform.core.ports import Aggregator, BlobStore, Contribution
from flplatform.files.modelfile import read_layout

PARTS = 2
"""Threads that share one aggregation, the caller's included."""
TILES_BETWEEN_DROPS = 16


class _Places:
    """Where elements lie in a model file."""

    def __init__(self, layout: Layout) -> None:
        self._tensors = {
            spec.name: (offset, DTYPES[spec.dtype].itemsize)
            for spec, offset in zip(layout.manifest.tensors, layout.offsets, strict=True)
        }

    def of(self, name: str, element: int) -> int:
        """Return the offset of an element in bytes from the start of the file."""
        offset, itemsize = self._tensors[name]
        return offset + element * itemsize


class _MappedModel:
    """A model file, mapped, whose pages can be dropped behind the reader."""

    def __init__(self, path: Path) -> None:
        layout = read_layout(path)
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._places = _Places(layout)
        self.manifest = layout.manifest
        self.arrays = layout.views(memoryview(self._mapping))

    def drop(self, tiles: Sequence[Tile]) -> None:
        """Let go of the whole pages between the first and the last of `tiles`.

        That they can be read again makes it harmless if other tensors lie there too.
        """
        begin = self._places.of(tiles[0].name, tiles[0].start)
        begin += -begin % mmap.PAGESIZE
        length = self._places.of(tiles[-1].name, tiles[-1].stop) - begin
        if length >= mmap.PAGESIZE:
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, length - length % mmap.PAGESIZE)


def aggregate_round(
    blobs: BlobStore,
    closed: Iterable[tuple[str, ModelRef, float]],
    base: ModelRef,
    aggregator: Aggregator,
    pool: Executor,
) -> ModelRef:
    """Combine a closed round's updates and store the result: the same arguments, the same digest.

    It blocks, and works in the calling thread too, so that it may itself run in `pool`.

    Args:
        blobs: holds the updates and the base model, and takes the result.
        closed: site, update and weight of each contribution, in any order.
        base: the round's model.
        aggregator: how to combine.
        pool: threads that may help.

    Raises:
        NotFoundError: a blob is missing.
        ModelFormatError: an update does not have the tensors of the base model.
        ResourceExhaustedError: the disk is full.
        FLError: what the aggregator refuses.
    """
    base_model = _MappedModel(blobs.path(base.digest))
    models = [base_model]
    contributions = []
    for site, ref, weight in closed:
        model = _MappedModel(blobs.path(ref.digest))
        base_model.manifest.check_same(model.manifest, f"update of {site}")
        models.append(model)
        contributions.append(Contribution(site, weight, model.arrays))
    ordered = in_order(contributions)
    header = encode_header(base_model.manifest)
    places = _Places(parse_header(header, base_model.manifest.file_bytes()))

    def fill(path: Path) -> None:
        with path.open("xb") as file:
            handle = file.fileno()
            _write_at(handle, memoryview(header), 0)

            def write(tile: Tile, values: Array) -> None:
                _write_at(handle, values.view("u1").data, places.of(tile.name, tile.start))

            def work(tiles: Sequence[Tile]) -> None:
                for start in range(0, len(tiles), TILES_BETWEEN_DROPS):
                    some = tiles[start : start + TILES_BETWEEN_DROPS]
                    aggregate_range(aggregator, some, base_model.arrays, ordered, write)
                    for model in models:
                        model.drop(some)

            _share(pool, work, ranges(base_model.manifest, PARTS))

    return blobs.create(fill)


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def _share(
    pool: Executor, work: Callable[[Sequence[Tile]], None], parts: Sequence[Sequence[Tile]]
) -> None:
    """Do all parts: the first here, the others in `pool` or, where it has no free thread, here."""
    helpers = [(pool.submit(work, part), part) for part in parts[1:]]
    try:
        for part in parts[:1]:
            work(part)
        for helper, part in helpers:
            if helper.cancel():
                work(part)
            else:
                helper.result()
    finally:  # nobody may go on with what the caller is about to close
        wait([helper for helper, _ in helpers if not helper.cancel()])
