"""Model headers: every lie is refused before anything is allocated."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.core import model
from flplatform.core.errors import ModelFormatError
from flplatform.core.model import (
    Array,
    Layout,
    Manifest,
    TensorSpec,
    check_digest,
    encode_header,
    header_length,
    parse_header,
)
from tests.support.models import NUMPY_DTYPES, arrays_of, small_model

Header = dict[str, Any]


def packed(header: Header | str | bytes) -> bytes:
    """Return length and header as they lie in a file."""
    text = json.dumps(header) if isinstance(header, dict) else header
    data = text.encode() if isinstance(text, str) else text
    return len(data).to_bytes(8, "little") + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def check_consistent(layout: Layout, prefix: bytes, file_bytes: int) -> None:
    """Check, independently of the parser, that tensors cover exactly the data of the file."""
    end = header_length(prefix)
    pairs = zip(layout.manifest.tensors, layout.offsets, strict=True)
    for spec, offset in sorted(pairs, key=lambda pair: (pair[1], pair[0].size_bytes)):
        assert offset == end
        assert all(isinstance(size, int) and size >= 0 for size in spec.shape)
        end += math.prod(spec.shape) * np.dtype(model.DTYPES[spec.dtype]).itemsize
    assert end == file_bytes == layout.file_bytes
    names = [spec.name for spec in layout.manifest.tensors]
    assert names == sorted(set(names))
    assert names
    if file_bytes < 100_000:
        views = layout.views(bytes(file_bytes))
        assert [(v.shape, v.dtype.str) for v in views.values()] == [
            (s.shape, model.DTYPES[s.dtype].str) for s in layout.manifest.tensors
        ]


def test_a_manifest_describes_arrays_in_name_order() -> None:
    manifest = Manifest.of({"b": np.zeros((2, 3), "f4"), "a": np.array(1, "i8")})
    assert manifest.tensors == (TensorSpec("a", "I64", ()), TensorSpec("b", "F32", (2, 3)))
    assert manifest.size_bytes == 32
    assert manifest.parameters == 7
    assert manifest.file_bytes() == len(encode_header(manifest)) + 32


def test_big_endian_arrays_are_described_as_what_is_written() -> None:
    assert Manifest.of({"a": np.zeros(2, ">f4")}).tensors[0].dtype == "F32"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no tensors"),
        ({"a": [1.0]}, "is a list, not a numpy array"),
        ({"a": np.zeros(1, "c8")}, "complex64 is not supported"),
        ({"a": np.array(["x"])}, "not supported"),
        ({"a": np.zeros(1, object)}, "not supported"),
        ({"": np.zeros(1)}, "printable name"),
        ({"a\n": np.zeros(1)}, "printable name"),
        ({"a\ud800": np.zeros(1)}, "printable name"),
        ({"a" * 501: np.zeros(1)}, "printable name"),
        ({"__metadata__": np.zeros(1)}, "cannot name a tensor"),
        ({str(n): np.zeros(0) for n in range(10_001)}, "more than 10000"),
    ],
)
def test_what_is_no_model_is_refused(arrays: Mapping[str, Array], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        Manifest.of(arrays)


def test_a_header_that_no_reader_accepts_is_not_written() -> None:
    long = Manifest.of({f"{n:05}" + "x" * 490: np.zeros(0) for n in range(9_000)})
    with pytest.raises(ModelFormatError, match="at most 4000000"):
        long.file_bytes()


def test_differences_to_the_model_are_named() -> None:
    mine = Manifest.of({"a": np.zeros(2, "f4"), "b": np.zeros(2, "f4")})
    mine.check_same(mine, "update")
    for arrays, message in (
        ({"a": np.zeros(2, "f4")}, r"update\['b'\]: tensor is missing"),
        ({"a": np.zeros(2, "f4"), "c": np.zeros(2, "f4")}, r"update\['b'\]"),
        ({n: np.zeros(2, "f4") for n in "abc"}, r"update\['c'\]: the model has no such"),
        ({"a": np.zeros(2, "f8"), "b": np.zeros(2, "f4")}, r"\['a'\]: is F64\[2\].*F32\[2\]"),
        ({"a": np.zeros(2, "f4"), "b": np.zeros((2, 1), "f4")}, r"is F32\[2, 1\]"),
    ):
        with pytest.raises(ModelFormatError, match=message):
            mine.check_same(Manifest.of(arrays), "update")


@pytest.mark.parametrize("digest", ["blake3:" + "0" * 63, "blake3:" + "G" * 64, "0" * 64,
                                    "blake3:" + "0" * 64 + "\n"])  # fmt: skip
def test_a_digest_is_checked(digest: str) -> None:
    assert check_digest("blake3:" + "0" * 64) == "blake3:" + "0" * 64
    with pytest.raises(ModelFormatError, match="64 hex digits"):
        check_digest(digest)


@settings(deadline=None)
@given(arrays=arrays_of())
def test_a_canonical_header_parses_to_itself(arrays: Mapping[str, Array]) -> None:
    manifest = Manifest.of(arrays)
    header = encode_header(manifest)
    assert len(header) % 8 == 0
    layout = parse_header(header, manifest.file_bytes())
    assert layout.manifest == manifest
    check_consistent(layout, header, manifest.file_bytes())
    for file_bytes in (manifest.file_bytes() - 1, manifest.file_bytes() + 1):
        with pytest.raises(ModelFormatError):
            parse_header(header, file_bytes)


@settings(deadline=None)
@given(arrays=arrays_of())
def test_parity_with_safetensors_reading(arrays: Mapping[str, Array]) -> None:
    data = safetensors.numpy.save(dict(arrays), metadata={"format": "np"})
    views = parse_header(data, len(data)).views(data)
    assert views.keys() == arrays.keys()
    for name, view in views.items():
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, arrays[name], strict=True)


@settings(deadline=None)
@given(arrays=arrays_of(NUMPY_DTYPES))
def test_parity_with_safetensors_writing(arrays: Mapping[str, Array]) -> None:
    manifest = Manifest.of(arrays)
    data = encode_header(manifest) + b"".join(arrays[s.name].tobytes() for s in manifest.tensors)
    loaded = safetensors.numpy.load(data)
    assert loaded.keys() == arrays.keys()
    for name, array in loaded.items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


HUGE = 1 << 40
LIES: list[tuple[Header | str | bytes, int, str]] = [
    ({"a": entry()}, 7, "describes"),
    ({"a": entry()}, 9, "describes"),
    ({"a": entry(offsets=(0, 9))}, 9, "takes 8 bytes"),
    ({"a": entry(offsets=(8, 0))}, 8, "begin, end"),
    ({"a": entry(offsets=(-8, 0))}, 8, "begin, end"),
    ({"a": entry(offsets=(0, 8.0))}, 8, "begin, end"),
    ({"a": entry(offsets=(0, 4, 8))}, 8, "begin, end"),
    ({"a": entry(offsets=(8, 16))}, 16, "overlap or gap"),
    ({"a": entry(), "b": entry()}, 8, "overlap or gap"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlap or gap"),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "overlap or gap"),
    ({"a": entry(shape=(HUGE,))}, 8, "takes 4398046511104 bytes"),
    ({"a": entry(shape=(HUGE, HUGE, HUGE))}, 8, "takes"),
    ({"a": entry(shape=(0, HUGE, HUGE), offsets=(0, 0))}, 0, "too large"),
    ({"a": entry(shape=(HUGE, HUGE, 0), offsets=(0, 0))}, 0, "too large"),
    ({"a": entry(shape=(HUGE,), offsets=(0, 4 * HUGE))}, 8, "describes"),
    ({"a": entry(shape=(1 << 46,), dtype="U8", offsets=(0, 1 << 46)),
      "b": entry(shape=(1 << 46,), dtype="U8", offsets=(1 << 46, 1 << 47))}, 1 << 47, "begin, end"),
    ({"a": entry(shape=(1 << 64,))}, 8, "sizes"),
    ({"a": entry(shape=(-2,))}, 8, "sizes"),
    ({"a": entry(shape=(True, 2))}, 8, "sizes"),
    ({"a": entry(shape=(2.0,))}, 8, "sizes"),
    ({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, 4, "sizes"),
    ({"a": entry(dtype="F8")}, 8, "is not one of"),
    ({"a": entry(dtype=["F32"])}, 8, "is not one of"),
    ({"a": entry() | {"more": 1}}, 8, "exactly"),
    ({"a": {"dtype": "F32"}}, 8, "exactly"),
    ({"a": [1]}, 8, "exactly"),
    ({}, 0, "no tensors"),
    ({"__metadata__": {"a": "b"}}, 0, "no tensors"),
    ({"": entry()}, 8, "printable name"),
    ({"\ud800": entry()}, 8, "printable name"),
    ({"\x00": entry()}, 8, "printable name"),
    ('{"a": NaN}', 8, "exactly"),
    ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8, "sizes"),
    ('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8, "sizes"),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
     '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "twice"),
    ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "twice"),
    ('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}', 8, "JSON"),
    ("[" * 100_000, 8, "JSON"),
    ('{"a":' * 100_000, 8, "JSON"),
    ("[]", 8, "not a JSON object"),
    ("null", 8, "not a JSON object"),
    (b"\xff\xfe", 8, "JSON"),
    (b"{", 8, "2 to 4000000"),
    ({str(n): entry("U8", (0,), (0, 0)) for n in range(10_001)}, 0, "more than 10000"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data_bytes", "message"), LIES)
def test_a_lying_header_is_refused(
    header: Header | str | bytes, data_bytes: int, message: str
) -> None:
    prefix = packed(header)
    with pytest.raises(ModelFormatError, match=message):
        parse_header(prefix, len(prefix) + data_bytes)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (b"", "ends before"),
        (bytes(7), "ends before"),
        (bytes(8), "declares 0 bytes"),
        (b"\xff" * 8, "declares 18446744073709551615 bytes"),
        ((4_000_001).to_bytes(8, "little"), "declares 4000001 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "longer than the file"),
    ],
)
def test_a_lying_length_is_refused(prefix: bytes, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        parse_header(prefix, len(prefix))


def test_several_empty_tensors_may_lie_at_one_place() -> None:
    empty = entry("F32", (0, 3), (0, 0))
    prefix = packed({"b": empty, "a": empty, "c": entry(), "d": entry("U8", (0,), (8, 8))})
    check_consistent(parse_header(prefix, len(prefix) + 8), prefix, len(prefix) + 8)


def test_metadata_and_any_order_are_accepted_from_others() -> None:
    prefix = packed({"__metadata__": {"x": "y"}, "b": entry(), "a": entry(offsets=(8, 16))})
    layout = parse_header(prefix, len(prefix) + 16)
    assert [spec.name for spec in layout.manifest.tensors] == ["a", "b"]
    check_consistent(layout, prefix, len(prefix) + 16)


VALUES = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([0, 1, 2**31, 2**40, 2**46, 2**63, 2**64, -1, 1.5, True, None, math.nan]),
    st.sampled_from(["F32", "F64", "BOOL", "", "x"]),
    st.lists(st.sampled_from([0, 1, 2, 8, 2**40, 2**62, -1]), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def mutate(header: Header, draw: Callable[..., Any]) -> None:
    """Change one thing somewhere in a header."""
    name = draw(st.sampled_from(sorted(header)))
    match draw(st.sampled_from(["field", "size", "drop", "rename", "copy", "add"])):
        case "field":
            header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(
                VALUES
            )
        case "size":
            sizes = header[name].get(draw(st.sampled_from(["shape", "data_offsets"])))
            if isinstance(sizes, list):
                sizes.insert(draw(st.integers(0, len(sizes))), draw(VALUES))
                del sizes[draw(st.integers(0, len(sizes) - 1))]
        case "drop":
            header[name].pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        case "rename":
            header[draw(st.text(max_size=3))] = header.pop(name)
        case "copy":
            header[draw(st.text(min_size=1, max_size=3))] = dict(header[name])
        case "add":
            header[draw(st.text(min_size=1, max_size=3))] = entry("U8", (0,), (0, 0))


def check_refused_or_consistent(prefix: bytes, file_bytes: int) -> None:
    try:
        layout = parse_header(prefix, file_bytes)
    except ModelFormatError:
        return
    check_consistent(layout, prefix, file_bytes)


@settings(max_examples=400, deadline=None)
@given(arrays=arrays_of(), data=st.data())
def test_a_mutated_header_is_refused_or_consistent(
    arrays: Mapping[str, Array], data: st.DataObject
) -> None:
    manifest = Manifest.of(arrays)
    header = json.loads(encode_header(manifest)[8:])
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(header, data.draw)
        if not header or not all(isinstance(value, dict) for value in header.values()):
            break
    prefix = packed(header)
    claimed = [len(prefix) + manifest.size_bytes, data.draw(st.integers(0, 2**48))]
    for file_bytes in claimed:
        check_refused_or_consistent(prefix, file_bytes)


@settings(max_examples=400, deadline=None)
@given(position=st.integers(0, 2000), byte=st.integers(0, 255), extra=st.integers(-8, 8))
def test_a_flipped_byte_is_refused_or_consistent(position: int, byte: int, extra: int) -> None:
    manifest = Manifest.of(small_model())
    prefix = bytearray(encode_header(manifest))
    prefix[position % len(prefix)] = byte
    check_refused_or_consistent(bytes(prefix), manifest.file_bytes() + extra)


@settings(deadline=None)
@given(garbage=st.binary(max_size=200), file_bytes=st.integers(0, 1000))
def test_garbage_is_refused_or_consistent(garbage: bytes, file_bytes: int) -> None:
    check_refused_or_consistent(garbage, file_bytes)
    check_refused_or_consistent(packed(garbage), file_bytes)
