"""Model files that are written tile by tile, in any order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.core.model import DTYPES, Array, Layout, Manifest, encode_header, parse_header


class Places:
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


class NewModel:
    """A model file that is being written, tile by tile, in any order."""

    def __init__(self, manifest: Manifest) -> None:
        self._header = encode_header(manifest)
        self._places = Places(parse_header(self._header, manifest.file_bytes()))
        self._handle = -1

    @contextmanager
    def open(self, path: Path) -> Iterator[None]:
        """Take values for a file at `path`, which must not exist, while in the block."""
        with path.open("xb") as file:
            self._handle = file.fileno()
            _write_at(self._handle, memoryview(self._header), 0)
            yield

    def write(self, name: str, start: int, values: Array) -> None:
        """Write flat `values` from element `start` of a tensor on."""
        _write_at(self._handle, values.view("u1").data, self._places.of(name, start))


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count
