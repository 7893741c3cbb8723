"""Model files: mapped for reading, written in one pass."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flplatform.core.errors import ModelFormatError
from flplatform.core.model import (
    DTYPES,
    LENGTH_BYTES,
    Array,
    Arrays,
    Layout,
    Manifest,
    encode_header,
    header_length,
    parse_header,
)
from flplatform.files.durable import fsync_dir


def read_layout(path: Path) -> Layout:
    """Check a model file's header against its size, reading only the header.

    Raises:
        ModelFormatError: the header does not describe this file.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        if size >= LENGTH_BYTES:
            prefix += file.read(header_length(prefix) - LENGTH_BYTES)
    return parse_header(prefix, size)


@contextmanager
def mapped(path: Path) -> Iterator[dict[str, Array]]:
    """Map a model file and yield read-only views of its tensors.

    The file must never be truncated or rewritten while mapped: model files are immutable. Views
    that outlive the block keep the mapping alive.

    Raises:
        ModelFormatError: the header does not describe this file.
    """
    layout = read_layout(path)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # No explicit close: a view still in use would make it fail; the last reference unmaps.
    yield layout.views(memoryview(mapping))


def load(path: Path) -> dict[str, Array]:
    """Return the tensors of a model file as read-only mapped arrays.

    Raises:
        ModelFormatError: the header does not describe this file.
    """
    with mapped(path) as arrays:
        return arrays


def load_copy(path: Path) -> dict[str, Array]:
    """Return the tensors of a model file as private, writable arrays.

    Raises:
        ModelFormatError: the header does not describe this file.
    """
    with mapped(path) as arrays:
        return {name: np.array(array) for name, array in arrays.items()}


def save(path: Path, arrays: Arrays) -> Manifest:
    """Write a canonical model file that must not exist yet, durable on return.

    Raises:
        ModelFormatError: an array has an unsupported dtype, or there are none.
        OSError: the disk refused, or `path` exists.
    """
    manifest = Manifest.of(arrays)
    with path.open("xb") as file:
        file.write(encode_header(manifest))
        for spec in manifest.tensors:
            array = np.ascontiguousarray(arrays[spec.name], dtype=DTYPES[spec.dtype])
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(path.parent)
    return manifest


def check_finite(arrays: Arrays, what: str = "update") -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelFormatError: names the first tensor that holds one, and how many.
    """
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype.kind != "f":
            continue
        # A sum is finite unless a value is not, or it overflowed: look closer only then.
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.add.reduce(array, axis=None, dtype=np.float64)
        if np.isfinite(total):
            continue
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ModelFormatError(
                f"{bad} of {array.size} values are NaN or infinite",
                field=f"{what}[{name!r}]",
                hint="lower the learning rate or clip gradients",
            )
