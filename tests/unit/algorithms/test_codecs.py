"""Codecs: within their error bounds, and back to exactly what was said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flplatform.algorithms import tiles
from flplatform.algorithms.codecs import (
    BLOCK,
    Codec,
    check_codec,
    decode,
    encode,
    error_bound,
    model_on_wire,
    part_on_wire,
    split_codec,
    wire_manifest,
)
from flplatform.algorithms.tiles import tiles_of
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import DTYPES, Array, Arrays, Manifest, TensorSpec
from tests.support.models import arrays_of

LOSSY: tuple[Codec, ...] = ("bf16", "fp16", "int8")


def empty(manifest: Manifest) -> dict[str, Array]:
    return {spec.name: np.empty(spec.shape, DTYPES[spec.dtype]) for spec in manifest.tensors}


def there(codec: Codec, arrays: Arrays, base: Arrays | None = None) -> dict[str, Array]:
    manifest = Manifest.of(arrays)
    wire = empty(wire_manifest(codec, manifest))

    def write(name: str, start: int, values: Array) -> None:
        assert values.dtype == wire[name].dtype
        wire[name].reshape(-1)[start : start + values.size] = values

    encode(codec, manifest, arrays, base, write)
    return wire


def back(
    codec: Codec, manifest: Manifest, wire: Arrays, base: Arrays | None = None
) -> dict[str, Array]:
    found = empty(manifest)

    def write(name: str, start: int, values: Array) -> None:
        assert values.dtype == found[name].dtype
        found[name].reshape(-1)[start : start + values.size] = values

    decode(codec, manifest, wire, base, write)
    return found


VALUES = st.one_of(
    npst.arrays("f4", st.integers(0, 9), elements=st.floats(-60000, 60000, width=32)),
    npst.arrays("f8", st.integers(0, 9), elements=st.floats(-1e4, 1e4)),
    npst.arrays("f4", st.just(7), elements=st.floats(-(2.0**-130), 2.0**-130, width=32)),
)


@pytest.mark.parametrize("codec", LOSSY)
@settings(deadline=None)
@given(values=VALUES)
def test_values_come_back_within_the_bound(codec: Codec, values: Array) -> None:
    found = back(codec, Manifest.of({"w": values}), there(codec, {"w": values}))["w"]
    wide = values.astype("f8")
    # Coming back, the value is rounded to its own dtype once more.
    own = np.abs(wide) * np.finfo(values.dtype).eps + float(
        np.finfo(values.dtype).smallest_subnormal
    )
    assert (np.abs(found.astype("f8") - wide) <= error_bound(codec, wide) + own).all()


@pytest.mark.parametrize("codec", LOSSY)
@settings(deadline=None, max_examples=50)
@given(arrays=arrays_of(("F32", "F16", "I64", "I8", "U8", "BOOL")))
def test_what_is_not_encoded_is_exact(codec: Codec, arrays: Arrays) -> None:
    arrays = {
        name: np.asarray(np.clip(array, -6e4, 6e4), array.dtype)
        if array.dtype.kind == "f"
        else array
        for name, array in arrays.items()
    }
    manifest = Manifest.of(arrays)
    wire = there(codec, arrays)
    assert Manifest.of(wire) == wire_manifest(codec, manifest)
    found = back(codec, manifest, wire)
    for name, array in arrays.items():
        exact = array.dtype.kind != "f" or (codec != "int8" and array.dtype == np.float16)
        if exact:
            assert found[name].tobytes() == array.tobytes()
    # What came back is what the codec can say: saying it again changes no bit of the two-byte ones.
    if codec != "int8":
        again = back(codec, manifest, there(codec, found))
        assert all(again[name].tobytes() == found[name].tobytes() for name in found)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_change_is_said_more_exactly_than_a_value(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal(5000).astype("f4")}
    arrays = {"w": (base["w"] + 1e-4 * rng.standard_normal(5000)).astype("f4")}
    manifest = Manifest.of(arrays)
    change = arrays["w"].astype("f8") - base["w"]
    found = back(codec, manifest, there(codec, arrays, base), base)["w"]
    # Besides the codec's error the sum is rounded to float32.
    assert (np.abs(found - arrays["w"]) <= error_bound(codec, change) + 2.0**-22).all()
    plain = back(codec, manifest, there(codec, arrays))["w"]
    assert np.abs(found - arrays["w"]).max() < np.abs(plain - arrays["w"]).max() / 50


@pytest.mark.parametrize("codec", LOSSY)
def test_tiles_of_any_size_give_the_same_bytes(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    arrays = {"a": rng.standard_normal((30, 1001)), "b": rng.standard_normal(70_001).astype("f4")}
    manifest = Manifest.of(arrays)
    expected = there(codec, arrays)
    for size in (BLOCK * 8, 1 << 16, 1 << 30):
        monkeypatch.setattr(tiles, "TILE_BYTES", size)
        assert all(tile.start % BLOCK == 0 for tile in tiles_of(manifest))
        wire = there(codec, arrays)
        assert all(wire[name].tobytes() == expected[name].tobytes() for name in expected)
        found = back(codec, manifest, wire)
        np.testing.assert_allclose(found["a"], arrays["a"], atol=0.05)


def test_sizes_on_the_wire() -> None:
    manifest = Manifest.of({"w": np.zeros(1_000_000, "f4")})
    full = manifest.size_bytes
    assert wire_manifest("none", manifest) == manifest
    assert wire_manifest("bf16", manifest).size_bytes == full // 2
    assert wire_manifest("int8", manifest).size_bytes < full * 0.2515


def test_what_a_codec_cannot_say_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="beyond float16") as caught:
        there("fp16", {"w": np.array([1e5], "f4")})
    assert "bf16" in caught.value.hint
    with pytest.raises(ModelFormatError, match="beyond bfloat16"):
        there("bf16", {"w": np.array([1e300])})
    with pytest.raises(ModelFormatError, match="beyond float32"):
        there("int8", {"w": np.array([1e300])})
    with pytest.raises(ModelFormatError, match="beyond float32"):
        there("int8", {"w": np.array([1.7e308])}, {"w": np.array([-1.7e308])})
    wire = {"q/w": np.array([127], "i1"), "s/w": np.array([3e38], "f4")}
    with pytest.raises(ModelFormatError, match="beyond float32") as caught:
        back("int8", Manifest.of({"w": np.zeros(1, "f4")}), wire)
    assert caught.value.field == "model['w']"


# ---- names --------------------------------------------------------------------------------------


def test_a_codec_is_named_with_or_without_zstd() -> None:
    assert split_codec("none") == ("none", False)
    assert split_codec("zstd") == ("none", True)
    assert split_codec("int8") == ("int8", False)
    assert split_codec("bf16+zstd") == ("bf16", True)
    for name in ("", "gzip", "none+zstd", "zstd+int8", "int8+zstd+zstd", "int8+", "+zstd"):
        with pytest.raises(InvalidArgumentError, match="unknown to this release"):
            split_codec(name)


@pytest.mark.parametrize("codec", LOSSY)
@settings(deadline=None, max_examples=50)
@given(arrays=arrays_of(), data=st.data())
def test_a_wire_file_tells_which_part_it_holds(
    codec: Codec, arrays: Arrays, data: st.DataObject
) -> None:
    whole = Manifest.of(arrays)
    some = data.draw(st.sets(st.sampled_from(sorted(arrays)), min_size=1))
    part = Manifest(tuple(spec for spec in whole.tensors if spec.name in some))
    found = wire_manifest(codec, part)
    assert part_on_wire(codec, whole, found) == part
    if codec != "int8":
        assert model_on_wire(found) == part
    with pytest.raises(ModelFormatError):
        part_on_wire(codec, whole, Manifest((*found.tensors, TensorSpec("x", "F32", (1,)))))


def test_a_codec_whose_file_could_not_be_read_is_refused() -> None:
    many = Manifest(tuple(TensorSpec(f"{n:05}", "F32", (1,)) for n in range(6000)))
    check_codec("bf16", many)
    with pytest.raises(ModelFormatError, match="more than 10000 tensors"):
        check_codec("int8+zstd", many)
    with pytest.raises(ModelFormatError, match="not a printable name"):
        check_codec("fp16", Manifest((TensorSpec("n" * 499, "F32", (1,)),)))


@pytest.mark.parametrize("down", ["bf16", "fp16"])
def test_the_base_may_be_rounded_while_decoding(down: Codec) -> None:
    rng = np.random.default_rng(1)
    base = {"w": rng.standard_normal(3000).astype("f4"), "d": rng.standard_normal(5)}
    manifest = Manifest.of(base)
    received = back(down, manifest, there(down, base))
    trained = {name: array + array.dtype.type(0.25) for name, array in received.items()}
    wire = there("int8", trained, received)
    found = empty(manifest)

    def write(name: str, start: int, values: Array) -> None:
        found[name].reshape(-1)[start : start + values.size] = values

    decode("int8", manifest, wire, base, write, down)
    for name, array in back("int8", manifest, wire, received).items():
        np.testing.assert_array_equal(found[name], array)
