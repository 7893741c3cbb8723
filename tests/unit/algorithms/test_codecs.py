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
    decode,
    encode,
    error_bound,
    wire_manifest,
)
from flplatform.algorithms.tiles import tiles_of
from flplatform.core.errors import ModelFormatError
from flplatform.core.model import DTYPES, Array, Arrays, Manifest
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
