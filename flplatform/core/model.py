"""What a model is: named tensors, described before a byte of them is allocated.

A model file is a safetensors file: an 8-byte little-endian header length, a JSON header, raw
little-endian tensors. This module parses and writes the header only; `files.modelfile` maps it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flplatform.core.errors import ModelFormatError

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

METADATA = "__metadata__"
"""The one key of a header that is no tensor; ignored."""
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4_000_000
MAX_TENSORS = 10_000
MAX_RANK = 32
MAX_NAME_CHARS = 500
MAX_MODEL_BYTES = 1 << 46
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}\Z")


def is_digest(text: str) -> bool:
    """Return whether `text` is `blake3:` and 64 hex digits."""
    return _DIGEST.match(text) is not None


def check_digest(digest: str, field: str = "digest") -> str:
    """Return `digest` if it is `blake3:` and 64 hex digits.

    Raises:
        ModelFormatError: it is not.
    """
    if not is_digest(digest):
        raise ModelFormatError(
            f"{digest[:100]!r} is not 'blake3:' followed by 64 hex digits", field=field
        )
    return digest


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether values of `dtype` are floating-point numbers; bfloat16 is of no numpy kind."""
    return dtype.kind == "f" or dtype == DTYPES["BF16"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype code (`F32`, `I64`, …) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """The tensors of a model, in name order."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Arrays) -> "Manifest":
        """Describe `arrays`.

        Raises:
            ModelFormatError: a value is not an array of a supported dtype, or there are too many.
        """
        specs = []
        for name in sorted(arrays):
            array = arrays[name]
            if not isinstance(array, np.ndarray):
                raise ModelFormatError(
                    f"is a {type(array).__name__}, not a numpy array", field=f"model[{name!r}]"
                )
            code = _CODES.get(array.dtype.newbyteorder("<"))
            if code is None:
                raise ModelFormatError(
                    f"dtype {array.dtype} is not supported",
                    field=f"model[{name!r}]",
                    hint=f"use one of {', '.join(str(d) for d in DTYPES.values())}",
                )
            specs.append(TensorSpec(name, code, tuple(array.shape)))
        manifest = cls(tuple(specs))
        _check_limits(manifest)
        return manifest

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.size_bytes for spec in self.tensors)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        return sum(math.prod(spec.shape) for spec in self.tensors)

    def file_bytes(self) -> int:
        """Size of the canonical file with these tensors."""
        return len(encode_header(self)) + self.size_bytes

    def check_same(self, other: "Manifest", what: str) -> None:
        """Compare the tensors of `other`, called `what` in messages, with these.

        Raises:
            ModelFormatError: a tensor is missing, unknown, or has another dtype or shape.
        """
        missing = {spec.name for spec in self.tensors} - {spec.name for spec in other.tensors}
        for name in sorted(missing):
            raise ModelFormatError("tensor is missing", field=f"{what}[{name!r}]")
        self.check_part(other, what)

    def check_part(self, other: "Manifest", what: str) -> None:
        """As `check_same`, but `other` may lack tensors.

        Raises:
            ModelFormatError: a tensor is unknown, or has another dtype or shape.
        """
        mine = {spec.name: spec for spec in self.tensors}
        theirs = {spec.name: spec for spec in other.tensors}
        for name in sorted(theirs.keys() - mine.keys()):
            raise ModelFormatError("the model has no such tensor", field=f"{what}[{name!r}]")
        for name, spec in theirs.items():
            expected = mine[name]
            if (spec.dtype, spec.shape) != (expected.dtype, expected.shape):
                raise ModelFormatError(
                    f"is {spec.dtype}{list(spec.shape)}, the model has "
                    f"{expected.dtype}{list(expected.shape)}",
                    field=f"{what}[{name!r}]",
                    hint="return every tensor with the dtype and shape in which it was received",
                )


@dataclass(frozen=True, slots=True)
class PartOf:
    """What a partial update may hold: tensors of a model, at least one."""

    whole: Manifest


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one file lie; offsets count from the start of the file, in bytes."""

    manifest: Manifest
    offsets: tuple[int, ...]
    file_bytes: int

    def views(self, buffer: memoryview | bytes) -> dict[str, Array]:
        """Return read-only views of the tensors in `buffer`, which holds the whole file."""
        views = {}
        for spec, offset in zip(self.manifest.tensors, self.offsets, strict=True):
            flat = np.frombuffer(
                buffer, DTYPES[spec.dtype], count=math.prod(spec.shape), offset=offset
            )
            view = flat.reshape(spec.shape)
            view.flags.writeable = False
            views[spec.name] = view
        return views


def encode_header(manifest: Manifest) -> bytes:
    """Return the canonical header: names sorted, tensors without gaps, padded to 8 bytes.

    Raises:
        ModelFormatError: it would be longer than any reader accepts.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for spec in manifest.tensors:
        end = offset + spec.size_bytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ModelFormatError(
            f"takes {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed",
            field="header",
            hint="use fewer tensors or shorter names",
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(prefix: bytes) -> int:
    """Return how many bytes length and header take together, from the first eight.

    Raises:
        ModelFormatError: fewer than eight bytes, or a length out of bounds.
    """
    if len(prefix) < LENGTH_BYTES:
        raise ModelFormatError("the file ends before its 8-byte header length", field="header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ModelFormatError(
            f"declares {length} bytes; 2 to {MAX_HEADER_BYTES} are allowed", field="header"
        )
    return LENGTH_BYTES + length


def parse_header(prefix: bytes, file_bytes: int) -> Layout:
    """Check a header against the size of its file, before anything is mapped or allocated.

    Args:
        prefix: the first bytes of the file, the whole header included.
        file_bytes: size of the file (or its declared size).

    Raises:
        ModelFormatError: the header is malformed, or does not describe exactly these bytes.
    """
    start = header_length(prefix)
    if start > file_bytes:
        raise ModelFormatError(f"is longer than the file of {file_bytes} bytes", field="header")
    try:
        entries = json.loads(prefix[LENGTH_BYTES:start].decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"is not valid JSON: {error}", field="header") from None
    if not isinstance(entries, dict):
        raise ModelFormatError("is not a JSON object", field="header")
    entries.pop(METADATA, None)
    if len(entries) > MAX_TENSORS:
        raise ModelFormatError(f"has more than {MAX_TENSORS} tensors", field="header")
    found = sorted(
        (_parse_entry(name, entry) for name, entry in entries.items()), key=lambda item: item[:2]
    )
    end = 0
    for begin, stop, spec in found:
        if begin != end:
            raise ModelFormatError(
                f"starts at byte {begin} of the data, expected {end}: overlap or gap",
                field=f"header[{spec.name!r}].data_offsets",
            )
        end = stop
    if start + end != file_bytes:
        raise ModelFormatError(
            f"describes {start + end} bytes, the file has {file_bytes}", field="header"
        )
    by_name = sorted(found, key=lambda item: item[2].name)
    manifest = Manifest(tuple(spec for _, _, spec in by_name))
    _check_limits(manifest)
    return Layout(manifest, tuple(start + begin for begin, _, _ in by_name), file_bytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _parse_entry(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    field = f"header[{name[:MAX_NAME_CHARS]!r}]"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFormatError("needs exactly dtype, shape and data_offsets", field=field)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFormatError(
            f"dtype {str(dtype)[:20]!r} is not one of {', '.join(DTYPES)}", field=field
        )
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise ModelFormatError("shape must be a list of sizes >= 0", field=field)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFormatError("data_offsets must be [begin, end]", field=field)
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.size_bytes != offsets[1] - offsets[0]:
        raise ModelFormatError(
            f"shape {shape} of {dtype} takes {spec.size_bytes} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}",
            field=field,
        )
    return offsets[0], offsets[1], spec


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_MODEL_BYTES for n in value
    )


def _check_limits(manifest: Manifest) -> None:
    if not manifest.tensors:
        raise ModelFormatError("has no tensors", field="model")
    if len(manifest.tensors) > MAX_TENSORS:
        raise ModelFormatError(f"has more than {MAX_TENSORS} tensors", field="model")
    for spec in manifest.tensors:
        if not spec.name or len(spec.name) > MAX_NAME_CHARS or not spec.name.isprintable():
            raise ModelFormatError(
                f"{spec.name[:60]!r} is not a printable name of 1 to {MAX_NAME_CHARS} characters",
                field="model",
            )
        if spec.name == METADATA:
            raise ModelFormatError(f"{METADATA!r} cannot name a tensor", field="model")
        # Sizes beside a zero count as well: numpy cannot shape an empty array beyond its limits.
        extent = math.prod(size or 1 for size in spec.shape)
        if extent * DTYPES[spec.dtype].itemsize > MAX_MODEL_BYTES:
            raise ModelFormatError(
                f"shape {list(spec.shape)} is too large", field=f"model[{spec.name!r}]"
            )
    if manifest.size_bytes > MAX_MODEL_BYTES:
        raise ModelFormatError(f"is larger than {MAX_MODEL_BYTES} bytes", field="model")
