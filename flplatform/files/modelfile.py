"""Model files: mapped for reading, written in one pass, checked while they arrive."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
    PartOf,
    encode_header,
    header_length,
    is_float,
    parse_header,
)
from flplatform.files.durable import fsync_dir, sync

STEP_BYTES = 4 << 20


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
        sync(file.fileno())
    fsync_dir(path.parent)
    return manifest


def check_finite(arrays: Arrays, what: str = "update") -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelFormatError: names the first tensor that holds one, and how many.
    """
    for name in sorted(arrays):
        array = arrays[name]
        if not is_float(array.dtype):
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


class ModelCheck:
    """Checks the bytes of a model file as they come: its exact header, then finite values."""

    def __init__(self, manifest: Manifest) -> None:
        self._header = encode_header(manifest)
        self._size = manifest.file_bytes()
        self._offset = 0
        self._split = b""  # the first bytes of a value whose others come with the next chunk
        self._spans: list[tuple[int, int, str, np.dtype[np.generic]]] = []
        begin = len(self._header)
        for spec in manifest.tensors:
            dtype = DTYPES[spec.dtype]
            if is_float(dtype):
                self._spans.append((begin, begin + spec.size_bytes, spec.name, dtype))
            begin += spec.size_bytes
        self._spans.reverse()

    def feed(self, chunk: bytes) -> None:
        """Check the next bytes.

        Raises:
            ModelFormatError: they differ from the header, or hold NaN or infinity.
        """
        expected = self._header[self._offset : self._offset + len(chunk)]
        if not chunk.startswith(expected):
            raise ModelFormatError(
                "is not that of the job's model: other tensors, or not in canonical form",
                field="header",
                hint="send a file with the model's tensors in name order, without metadata",
            )
        view = memoryview(chunk)
        end = self._offset + len(chunk)
        while self._spans and self._spans[-1][0] < end:
            begin, stop, name, dtype = self._spans[-1]
            start = max(begin - self._offset, 0)
            self._feed_tensor(view[start : stop - self._offset], name, dtype)
            if stop > end:
                break
            self._spans.pop()
        self._offset = end

    def end(self) -> None:
        """Check that no byte is missing or too many.

        Raises:
            ModelFormatError: one is.
        """
        if self._offset != self._size:
            raise ModelFormatError(f"has {self._offset} bytes, not {self._size}", field="file")

    def _feed_tensor(self, data: memoryview, name: str, dtype: np.dtype[np.generic]) -> None:
        if self._split:
            missing = dtype.itemsize - len(self._split)
            self._split += data[:missing]
            data = data[missing:]
            if len(self._split) < dtype.itemsize:
                return
            _check_values(np.frombuffer(self._split, dtype), name)
        whole = len(data) - len(data) % dtype.itemsize
        _check_values(np.frombuffer(data[:whole], dtype), name)
        self._split = bytes(data[whole:])


class FoundCheck:
    """As `ModelCheck`, for a file whose own header says which tensors it holds.

    Args:
        file_bytes: declared size of the file.
        max_header_bytes: most that length and header may take; so much is kept at most.
        accept: raises ModelFormatError for tensors that may not be.
    """

    def __init__(
        self, file_bytes: int, max_header_bytes: int, accept: Callable[[Manifest], object]
    ) -> None:
        self._file_bytes = file_bytes
        self._max_header_bytes = max_header_bytes
        self._accept = accept
        self._begin = bytearray()
        self._check: ModelCheck | None = None

    def feed(self, chunk: bytes) -> None:
        """Check the next bytes.

        Raises:
            ModelFormatError: the header is not canonical or names other tensors, or a value is
                NaN or infinite.
        """
        if self._check is not None:
            return self._check.feed(chunk)
        self._begin += chunk
        if len(self._begin) < LENGTH_BYTES:
            return None
        length = header_length(bytes(self._begin[:LENGTH_BYTES]))
        if length > self._max_header_bytes:
            raise ModelFormatError(
                f"takes {length} bytes, that of the whole model {self._max_header_bytes}",
                field="header",
            )
        if len(self._begin) < length:
            return None
        manifest = parse_header(bytes(self._begin[:length]), self._file_bytes).manifest
        self._accept(manifest)
        self._check = ModelCheck(manifest)
        return self._check.feed(bytes(self._begin))

    def end(self) -> None:
        """Check that no byte is missing or too many.

        Raises:
            ModelFormatError: one is.
        """
        if self._check is None:
            raise ModelFormatError("ends before its tensors begin", field="header")
        self._check.end()


def model_check(expected: Manifest | PartOf, size: int) -> ModelCheck | FoundCheck:
    """Return what checks the bytes of a model file of `size` bytes as they come.

    Raises:
        ModelFormatError: a file of these tensors has another size.
    """
    whole = expected.whole if isinstance(expected, PartOf) else expected
    most = whole.file_bytes()
    if size > most or (size < most and whole is expected):
        raise ModelFormatError(
            f"is {size} bytes, a model file of this job {most}",
            field="blob.size",
            hint="return tensors with the dtype and shape in which they were received",
        )
    if whole is expected:
        return ModelCheck(whole)
    accept = partial(whole.check_part, what="update")
    return FoundCheck(size, len(encode_header(whole)), accept)


def check_file(path: Path, check: ModelCheck | FoundCheck) -> None:
    """Hold a whole file against `check`.

    Raises:
        ModelFormatError: it does not stand.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(STEP_BYTES):
            check.feed(chunk)
    check.end()


def _check_values(values: Array, name: str) -> None:
    if values.itemsize == 2:  # isfinite is slow for half floats: look at the exponent bits
        mask = 0x7C00 if values.dtype.kind == "f" else 0x7F80
        exponents = values.view("<u2") & mask
        finite = not (exponents == mask).any()
    else:
        finite = bool(np.isfinite(values).all())
    if not finite:
        raise ModelFormatError(
            "holds NaN or infinity",
            field=f"update[{name!r}]",
            hint="lower the learning rate or clip gradients",
        )
