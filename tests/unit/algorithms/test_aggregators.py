"""The weighted mean: exact to the bit, whatever the order, the tiles or the machine."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flplatform.algorithms.aggregators import AGGREGATORS, matches
from flplatform.algorithms.tiles import Recipe, aggregate
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import Array, Manifest
from flplatform.core.ports import Contribution

MEAN = AGGREGATORS.create("weighted_mean", {})


def combine(
    tiles: Sequence[Array],
    weights: Sequence[float],
    args: Mapping[str, Any] | None = None,
    name: str = "w",
) -> Array:
    recipe = Recipe(AGGREGATORS.create("weighted_mean", args or {}))
    contributions = [
        Contribution(f"{n:04}", weight, {name: tile})
        for n, (tile, weight) in enumerate(zip(tiles, weights, strict=True))
    ]
    return aggregate(recipe, {name: np.zeros_like(tiles[0])}, contributions)[0][name]


@st.composite
def updates(draw: st.DrawFn, dtype: str, limit: float | None = None) -> tuple[list[Array], Any]:
    """One to four flat tiles of one length, and their weights; int64 stays exact in the sum."""
    sites, size = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    kind = np.dtype(dtype)
    bounds = {} if limit is None else {"min_value": -limit, "max_value": limit}
    if kind.kind == "i" and kind.itemsize == 8:
        bounds = {"min_value": -(1 << 40), "max_value": 1 << 40}
    elements = npst.from_dtype(kind, allow_nan=False, allow_infinity=False, **bounds)
    tiles = [draw(npst.arrays(kind, size, elements=elements)) for _ in range(sites)]
    weights = draw(st.lists(st.integers(1, 1 << 40), min_size=sites, max_size=sites))
    return tiles, [float(weight) for weight in weights]


def reference(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted mean in Python's floats: IEEE float64 without a compiler's freedom."""
    total = weighted = 0.0
    for number, (value, weight) in enumerate(zip(values, weights, strict=True)):
        total += weight
        weighted = weighted + value * weight if number else value * weight
    return weighted / total


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["f2", "f4", "f8"]))
def test_floats_equal_the_float64_reference_to_the_bit(data: st.DataObject, dtype: str) -> None:
    tiles, weights = data.draw(updates(dtype, 1e280 if dtype == "f8" else None))
    out = combine(tiles, weights)
    for place, value in enumerate(out):
        expected = reference([float(tile[place]) for tile in tiles], weights)
        assert value.tobytes() == np.array(expected).astype(dtype).tobytes()


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["u1", "i1", "i2", "i4", "i8"]))
def test_integers_are_the_exact_mean_half_to_even(data: st.DataObject, dtype: str) -> None:
    tiles, _ = data.draw(updates(dtype))
    weights = [float(n + 1) for n in range(len(tiles))]
    out = combine(tiles, weights)
    for place, value in enumerate(out):
        terms = (Fraction(int(t[place])) * int(w) for t, w in zip(tiles, weights, strict=True))
        assert value == round(sum(terms, Fraction(0)) / int(sum(weights)))


def test_halves_go_to_even() -> None:
    one, other = np.array([0, 1, 2, -1, -2], "i4"), np.array([1, 2, 3, -2, -3], "i4")
    assert combine([one, other], [1, 1]).tolist() == [0, 2, 2, -2, -2]


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)])
def test_integers_beyond_float64_are_refused_by_name(value: int) -> None:
    with pytest.raises(ModelFormatError, match=r"beyond 2\^53") as caught:
        combine([np.array([0, value], "i8")], [1], name="steps")
    assert caught.value.field == "update['steps']"
    assert "exclude_vars" in caught.value.hint
    edge = np.array([2**53, -(2**53)], "i8")
    assert combine([edge], [1]).tolist() == edge.tolist()


@settings(deadline=None)
@given(drawn=updates("f4"), power=st.integers(-20, 20))
def test_scaling_all_weights_changes_nothing(drawn: tuple[list[Array], Any], power: int) -> None:
    tiles, weights = drawn
    scaled = [weight * 2.0**power for weight in weights]
    assert combine(tiles, weights).tobytes() == combine(tiles, scaled).tobytes()


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["f2", "f4", "i4", "u1"]))
def test_the_mean_of_equal_updates_is_that_update(data: st.DataObject, dtype: str) -> None:
    tiles, weights = data.draw(updates(dtype))
    same = [tiles[0]] * len(tiles)
    assert combine(same, weights).tobytes() == tiles[0].tobytes()


@settings(deadline=None)
@given(drawn=updates("f4"))
def test_the_mean_lies_between_the_updates(drawn: tuple[list[Array], Any]) -> None:
    tiles, weights = drawn
    out = combine(tiles, weights)
    assert (np.min(tiles, axis=0) <= out).all()
    assert (out <= np.max(tiles, axis=0)).all()


def test_an_update_of_weight_zero_does_not_count() -> None:
    one, other = np.array([1.0, 2.0], "f4"), np.array([5.0, 5.0], "f4")
    assert combine([one, other], [3.0, 0.0]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("inf")]])
def test_weights_without_a_positive_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidArgumentError, match="add up to") as caught:
        combine([np.ones(2, "f4"), np.ones(2, "f4")], weights)
    assert caught.value.field == "weights"


def test_an_overflowing_sum_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="not finite") as caught:
        combine([np.array([1e300]), np.array([1e300])], [1e9, 1e9], name="a")
    assert caught.value.field == "update['a']"


def test_excluded_tensors_keep_the_base_value() -> None:
    mean = AGGREGATORS.create("weighted_mean", {"exclude_vars": r"running_|^head\."})
    for name, kept in (
        ("bn.running_mean", True), ("head.bias", True), ("ahead.bias", False), ("w", False),
    ):  # fmt: skip
        update = Contribution("a", 1.0, {name: np.array([2], "f4")})
        found, _ = aggregate(Recipe(mean), {name: np.array([7], "f4")}, [update])
        assert found[name] == (7 if kept else 2)
    flag = Contribution("a", 1.0, {"head.flag": np.array([False])})
    assert aggregate(Recipe(mean), {"head.flag": np.array([True])}, [flag])[0]["head.flag"]


def test_a_pattern_is_searched_for_and_the_empty_one_matches_nothing() -> None:
    assert matches("b.c", "abXcd")
    assert not matches("", "abc")


def test_weights_are_examples_times_the_sites_factor() -> None:
    mean = AGGREGATORS.create("weighted_mean", {"site_weights": {"a": 0.5, "b": 0}})
    assert [mean.weight_of(site, 10) for site in ("a", "b", "c")] == [5.0, 0.0, 10.0]


def test_what_has_no_mean_is_refused_at_submission() -> None:
    manifest = Manifest.of({"flag": np.zeros(1, "?"), "w": np.zeros(1)})
    with pytest.raises(InvalidArgumentError, match="bool tensor has no mean") as caught:
        MEAN.check(manifest, 1)
    assert caught.value.field == "model['flag']"
    assert "exclude_vars" in caught.value.hint
    AGGREGATORS.create("weighted_mean", {"exclude_vars": "flag"}).check(manifest, 1)
    with pytest.raises(InvalidArgumentError, match="every tensor"):
        AGGREGATORS.create("weighted_mean", {"exclude_vars": "."}).check(manifest, 1)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"exclude_vars": "("}, "args.exclude_vars"),
        ({"exclude_vars": 3}, "args.exclude_vars"),
        ({"exclude_vars": "x" * 1001}, "args.exclude_vars"),
        ({"site_weights": {"a": -1.0}}, "args.site_weights.a"),
        ({"site_weights": {"a": float("nan")}}, "args.site_weights.a"),
        ({"weights": {}}, "args.weights"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        AGGREGATORS.create("weighted_mean", args)
    assert caught.value.field == field


DIGEST = """
from hashlib import sha256
import numpy as np
from flplatform.algorithms.optimizers import OPTIMIZERS
from flplatform.algorithms.robust import AGGREGATORS
from flplatform.algorithms.tiles import Recipe, aggregate
from flplatform.core.ports import Contribution

rng = np.random.default_rng(7)
digest = sha256()
names = {"f2": "<f2", "f4": "<f4", "f8": "<f8", "i4": "<i4"}
def model():
    return {n: (rng.standard_normal(10_007) * 1000).astype(d) for n, d in names.items()}
base = model()
updates = [Contribution(str(n), w, model()) for n, w in enumerate([3.0, 1.0, 7.0, 1e6, 0.1])]
for name, args in (
    ("weighted_mean", {}), ("weighted_mean", {"max_norm": 9.5}), ("median", {}),
    ("trimmed_mean", {"trim": 1}), ("krum", {"byzantine": 1}), ("multi_krum", {"byzantine": 1}),
):
    for optimizer in (None, "fedavgm", "fedadagrad", "fedadam", "fedyogi"):
        made = OPTIMIZERS.create(optimizer, {}) if optimizer else None
        recipe = Recipe(AGGREGATORS.create(name, args), optimizer=made)
        found, state = aggregate(recipe, base, updates)
        found, state = aggregate(recipe, found, updates, state or None)
        for arrays in (found, state):
            for key in sorted(arrays):
                digest.update(arrays[key].tobytes())
print(digest.hexdigest())
"""


def test_the_bytes_do_not_depend_on_the_processor() -> None:
    modules = ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath")
    features: Any = next(sys.modules[name] for name in modules if name in sys.modules)
    had = [name for name in features.__cpu_dispatch__ if features.__cpu_features__[name]]
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"NPY_DISABLE_CPU_FEATURES": disabled},
            capture_output=True, text=True, check=True,
        ).stdout
        for disabled in ("", " ".join(had))
    }  # fmt: skip
    assert len(found) == 1
