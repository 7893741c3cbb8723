"""Robust aggregators: closed forms, preconditions, and what a hostile update can do."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flplatform.algorithms import robust
from flplatform.algorithms.robust import AGGREGATORS
from flplatform.algorithms.tiles import Recipe, aggregate, judge, measure, tiles_of
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError, ModelFormatError
from flplatform.core.model import Array, Manifest
from flplatform.core.ports import Contribution

ROBUST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("median", {}),
    ("trimmed_mean", {"trim": 1}),
    ("krum", {"byzantine": 1}),
    ("multi_krum", {"byzantine": 1}),
)


def combined(
    name: str, args: Mapping[str, Any], tiles: Sequence[Array], base: Array | None = None
) -> Array:
    updates = [Contribution(f"{n:04}", 1.0 + n, {"w": tile}) for n, tile in enumerate(tiles)]
    start = {"w": np.zeros_like(tiles[0]) if base is None else base}
    return aggregate(Recipe(AGGREGATORS.create(name, args)), start, updates)[0]["w"]


@st.composite
def updates(draw: st.DrawFn, least: int = 1) -> list[Array]:
    count, size = draw(st.integers(least, 9)), draw(st.integers(1, 5))
    elements = st.floats(-1e6, 1e6, width=32)
    return [draw(npst.arrays("f4", size, elements=elements)) for _ in range(count)]


@settings(deadline=None)
@given(tiles=updates())
def test_the_median_is_numpys(tiles: list[Array]) -> None:
    expected = np.median(np.array(tiles, "f8"), axis=0).astype("f4")
    assert combined("median", {}, tiles).tobytes() == (expected + np.float32(0)).tobytes() or (
        np.array_equal(combined("median", {}, tiles), expected)
    )


@settings(deadline=None)
@given(tiles=updates(least=3), trim=st.integers(0, 4))
def test_the_trimmed_mean_is_that_of_what_is_left(tiles: list[Array], trim: int) -> None:
    if len(tiles) <= 2 * trim:
        with pytest.raises(FailedPreconditionError, match="updates hold 'w'"):
            combined("trimmed_mean", {"trim": trim}, tiles)
        return
    kept = np.sort(np.array(tiles, "f8"), axis=0)[trim : len(tiles) - trim]
    np.testing.assert_allclose(
        combined("trimmed_mean", {"trim": trim}, tiles), kept.mean(axis=0), rtol=1e-6, atol=1e-6
    )


def krum_reference(tiles: Sequence[Array], f: int, select: int) -> Array:
    """Return the selection as the paper defines it, in plain Python."""
    count = len(tiles)
    far = [[float(np.sum((a.astype("f8") - b) ** 2)) for b in tiles] for a in tiles]
    scores = [
        sum(sorted(far[i][j] for j in range(count) if j != i)[: count - f - 2])
        for i in range(count)
    ]
    chosen = sorted(range(count), key=lambda i: scores[i])[:select]
    return np.mean([tiles[i].astype("f8") for i in sorted(chosen)], axis=0)


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 30), f=st.integers(0, 2), more=st.integers(0, 3))
def test_krum_selects_what_the_paper_does(seed: int, f: int, more: int) -> None:
    rng, count = np.random.default_rng(seed), 2 * f + 3 + more
    tiles = [rng.standard_normal(7).astype("f4") for _ in range(count)]
    found = combined("krum", {"byzantine": f}, tiles)
    np.testing.assert_array_equal(found, krum_reference(tiles, f, 1).astype("f4"))
    for select in (1, count - f - 2):
        found = combined("multi_krum", {"byzantine": f, "select": select}, tiles)
        np.testing.assert_allclose(found, krum_reference(tiles, f, select), rtol=1e-5, atol=1e-6)
    default = combined("multi_krum", {"byzantine": f}, tiles)
    assert default.tobytes() == found.tobytes()


@pytest.mark.parametrize(("name", "args"), ROBUST)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_one_attacker_stays_within_the_honest_hull(
    name: str, args: dict[str, Any], data: st.DataObject
) -> None:
    honest = data.draw(updates(least=4))
    attack = data.draw(st.sampled_from([1e30, -1e30, 3.4e38, -3.4e38]))
    place = data.draw(st.integers(0, len(honest)))
    hostile = np.full(honest[0].size, attack, "f4")
    found = combined(name, args, [*honest[:place], hostile, *honest[place:]])
    # The mean of a few float64 values may round beyond them by one unit of the last place.
    slack = 1e-6 * np.abs(honest).max(axis=0)
    assert (np.min(honest, axis=0) - slack <= found).all()
    assert (found <= np.max(honest, axis=0) + slack).all()


@pytest.mark.parametrize(("name", "args"), ROBUST)
def test_an_infinite_distance_selects_nobody_hostile(name: str, args: dict[str, Any]) -> None:
    honest = [np.full(3, value) for value in (1.0, 2.0, 3.0, 4.0)]
    found = combined(name, args, [*honest, np.full(3, 1.7e308)])
    assert (found >= 1).all()
    assert (found <= 4).all()


@pytest.mark.parametrize(("name", "args"), ROBUST)
@settings(deadline=None, max_examples=30)
@given(tiles=updates(least=5), power=st.integers(-10, 10), seed=st.integers(0, 99))
def test_scaling_and_weights(
    name: str, args: dict[str, Any], tiles: list[Array], power: int, seed: int
) -> None:
    tiles = [np.round(tile, 3) for tile in tiles]
    found = combined(name, args, tiles)
    scaled = combined(name, args, [tile * np.float32(2.0**power) for tile in tiles])
    normal = (np.abs(found) > 1e-30) | (found == 0)
    np.testing.assert_array_equal(scaled[normal], (found * np.float32(2.0**power))[normal])
    # Krum takes the first in name order among equal scores; the others depend on no order at all.
    if "krum" not in name:
        order = np.random.default_rng(seed).permutation(len(tiles))
        again = combined(name, args, [tiles[number] for number in order])
        np.testing.assert_allclose(again, found, rtol=1e-6, atol=1e-9)


def test_integers_round_half_to_even_and_have_a_limit() -> None:
    tiles = [np.array([0, 1, 2, -1], "i8"), np.array([1, 2, 3, -2], "i8")]
    assert combined("median", {}, tiles).tolist() == [0, 2, 2, -2]
    for name, args in ROBUST:
        with pytest.raises(ModelFormatError, match=r"beyond 2\^53"):
            combined(name, args, [np.array([1 << 60], "i8")] * 5)


def test_only_a_few_updates_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    tiles = [rng.standard_normal(1000).astype("f4") for _ in range(9)]
    expected = [combined(name, args, tiles) for name, args in ROBUST]
    monkeypatch.setattr(robust, "STACK_ELEMENTS", 64)
    for (name, args), whole in zip(ROBUST, expected, strict=True):
        assert combined(name, args, tiles).tobytes() == whole.tobytes()


def test_norm_clipping_bounds_each_sites_influence() -> None:
    base, near, far = np.zeros(4), np.full(4, 0.1), np.full(4, 1e9)
    args = {"max_norm": 1.0}
    found = combined("weighted_mean", args, [near, far], base)
    np.testing.assert_allclose(found, (near * 1 + np.full(4, 0.5) * 2) / 3, rtol=1e-12)
    assert combined("weighted_mean", {"max_norm": 1e12}, [near, far]).tobytes() == (
        combined("weighted_mean", {}, [near, far]).tobytes()
    )
    # A norm beyond float64 leaves nothing of the change, and nothing of the others is lost.
    found = combined("weighted_mean", args, [near, np.full(4, 1e300)], base)
    np.testing.assert_allclose(found, near / 3, rtol=1e-12)


def test_norms_leave_out_integers_and_excluded_tensors() -> None:
    base = {"n": np.zeros(3, "i4"), "out": np.zeros(3), "w": np.zeros(3)}
    update = {"n": np.full(3, 1000, "i4"), "out": np.full(3, 1e9), "w": np.full(3, 2.0)}
    recipe = Recipe(AGGREGATORS.create("weighted_mean", {"max_norm": 1.0, "exclude_vars": "out"}))
    contributions = [Contribution("a", 1.0, update)]
    parts = measure(recipe, tiles_of(Manifest.of(base)), base, contributions)
    (share,) = judge(recipe, contributions, parts)
    assert share.scale == pytest.approx(1 / np.sqrt(12))
    found, _ = aggregate(recipe, base, contributions)
    assert (found["n"].tolist(), found["out"].tolist()) == ([1000] * 3, [0] * 3)


@pytest.mark.parametrize(
    ("name", "args", "least"),
    [
        ("median", {}, 1),
        ("trimmed_mean", {"trim": 2}, 5),
        ("krum", {"byzantine": 2}, 7),
        ("multi_krum", {"byzantine": 1}, 5),
    ],
)
def test_a_quorum_that_cannot_protect_is_refused(
    name: str, args: dict[str, Any], least: int
) -> None:
    aggregator = AGGREGATORS.create(name, args)
    manifest = Manifest.of({"w": np.zeros(3)})
    aggregator.check(manifest, least)
    if least > 1:
        with pytest.raises(InvalidArgumentError, match=f"at least {least} updates") as caught:
            aggregator.check(manifest, least - 1)
        assert f"raise min_clients to {least}" in caught.value.hint
    with pytest.raises(InvalidArgumentError, match="bool tensor"):
        aggregator.check(Manifest.of({"w": np.zeros(3, "?")}), 99)


def test_a_selection_beyond_what_can_be_trusted_is_refused() -> None:
    manifest = Manifest.of({"w": np.zeros(3)})
    AGGREGATORS.create("multi_krum", {"byzantine": 1, "select": 3}).check(manifest, 6)
    with pytest.raises(InvalidArgumentError, match="at most 2 may be averaged"):
        AGGREGATORS.create("multi_krum", {"byzantine": 1, "select": 3}).check(manifest, 5)
    with pytest.raises(InvalidArgumentError, match="selects one"):
        AGGREGATORS.create("krum", {"byzantine": 1, "select": 3})
    with pytest.raises(FailedPreconditionError, match="needs 5 updates, there are 4"):
        combined("krum", {"byzantine": 1}, [np.zeros(2)] * 4)
