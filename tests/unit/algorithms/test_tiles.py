"""Tiles: they cover a model once, and their size and order change nothing."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.algorithms import tiles
from flplatform.algorithms.aggregators import AGGREGATORS
from flplatform.algorithms.tiles import (
    Combiner,
    Outputs,
    Recipe,
    Tile,
    aggregate,
    judge,
    ranges,
    tiles_of,
)
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.model import Array, Manifest
from flplatform.core.ports import Contribution
from tests.support.models import arrays_of

MEAN = Recipe(AGGREGATORS.create("weighted_mean", {}))
MODEL = Manifest.of(
    {
        "a": np.zeros((300, 1000), "f4"),
        "b": np.zeros(0, "f4"),
        "c": np.zeros((), "f8"),
        "d": np.zeros(70_000, "f8"),
    }
)


def big_model(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((300, 1000)).astype("f4"),
        "b": np.zeros(0, "f4"),
        "c": np.array(rng.standard_normal()),
        "d": rng.standard_normal(70_000),
    }


def check_cover(parts: list[list[Tile]], manifest: Manifest) -> None:
    expected = tiles_of(manifest)
    assert [tile for part in parts for tile in part] == expected
    for spec in manifest.tensors:
        covered = [place for t in expected if t.name == spec.name for place in (t.start, t.stop)]
        assert covered[1:-1:2] == covered[2::2]
        if covered:
            assert (covered[0], covered[-1]) == (0, int(np.prod(spec.shape)))
        else:
            assert spec.size_bytes == 0


@settings(deadline=None)
@given(arrays=arrays_of(), parts=st.integers(1, 5))
def test_ranges_cover_every_element_once(arrays: Mapping[str, Array], parts: int) -> None:
    manifest = Manifest.of(arrays)
    check_cover(ranges(manifest, parts), manifest)


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_ranges_are_of_about_equal_bytes(parts: int) -> None:
    found = ranges(MODEL, parts)
    check_cover(found, MODEL)
    itemsizes = {"a": 4, "c": 8, "d": 8}
    sizes = [sum((t.stop - t.start) * itemsizes[t.name] for t in part) for part in found]
    assert len(found) <= parts
    assert all(abs(size - MODEL.size_bytes / parts) <= tiles.TILE_BYTES for size in sizes)


def contributions() -> list[Contribution]:
    return [Contribution(f"site-{n}", float(n + 1), big_model(n)) for n in range(3)]


def test_order_of_arrival_and_tile_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = aggregate(MEAN, big_model(9), contributions())
    for name in ("a", "d"):
        mean = np.average([big_model(n)[name] for n in range(3)], axis=0, weights=[1.0, 2.0, 3.0])
        np.testing.assert_allclose(expected[name], mean, rtol=1e-5, atol=1e-6)
    for size in (1 << 10, 1 << 16, 1 << 30):
        monkeypatch.setattr(tiles, "TILE_BYTES", size)
        found, _ = aggregate(MEAN, big_model(9), reversed(contributions()))
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
        assert [array.shape for array in found.values()] == [a.shape for a in expected.values()]


def test_ranges_give_what_the_whole_gives() -> None:
    expected, _ = aggregate(MEAN, big_model(9), contributions())
    found = {name: np.zeros_like(array) for name, array in big_model(9).items()}

    def write(name: str, start: int, values: Array) -> None:
        found[name].reshape(-1)[start : start + values.size] = values

    shares = judge(MEAN, contributions(), [])
    for part in reversed(ranges(MODEL, 3)):
        outputs = Outputs(write, write)
        Combiner(MEAN, shares, big_model(9), contributions(), outputs).combine(part)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes()


def test_no_update_and_two_of_one_site_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no update"):
        aggregate(MEAN, big_model(9), [])
    with pytest.raises(InvalidArgumentError, match="site site-1 has two"):
        aggregate(MEAN, big_model(9), [*contributions(), contributions()[1]])
