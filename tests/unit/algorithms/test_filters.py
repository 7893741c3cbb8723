"""Privacy filters: what leaves a site, and how far it may have moved."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flplatform.algorithms.filters import BLOCK, FILTERS
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import Array


def norm_of(arrays: Mapping[str, Array], received: Mapping[str, Array]) -> float:
    squares = [
        (float(new) - float(old)) ** 2
        for name in arrays
        if arrays[name].dtype.kind == "f"
        for new, old in zip(arrays[name].flat, received[name].flat, strict=True)
    ]
    return math.sqrt(math.fsum(squares))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Array], dict[str, Array]]:
    """A trained and a received model of the same tensors."""
    trained, received = {}, {}
    for name in draw(st.sets(st.sampled_from("abcd"), min_size=1)):
        dtype = np.dtype(draw(st.sampled_from(["f2", "f4", "f8", "i4"])))
        shape = draw(npst.array_shapes(min_dims=0, max_dims=2, max_side=4))
        limit = 1e4 if dtype.kind == "f" else 1000
        elements = npst.from_dtype(
            dtype, min_value=-limit, max_value=limit, allow_nan=False, allow_infinity=False
        )
        trained[name] = draw(npst.arrays(dtype, shape, elements=elements))
        received[name] = draw(npst.arrays(dtype, shape, elements=elements))
    return trained, received


@settings(max_examples=200, deadline=None)
@given(pair=pairs(), max_norm=st.floats(1e-6, 1e5))
def test_the_change_is_bounded_and_keeps_its_direction(
    pair: tuple[dict[str, Array], dict[str, Array]], max_norm: float
) -> None:
    trained, received = pair
    before = {name: array.tobytes() for name, array in trained.items()}
    found = FILTERS.create("clip_norm", {"max_norm": max_norm})(trained, received)
    assert norm_of(found, received) <= max_norm * (1 + 1e-12)
    assert before == {name: array.tobytes() for name, array in trained.items()}
    for name, array in found.items():
        old, new = received[name], trained[name]
        assert (array.dtype, array.shape) == (new.dtype, new.shape)
        if array.dtype.kind == "f":
            assert (np.minimum(old, new) <= array).all()
            assert (array <= np.maximum(old, new)).all()
        else:
            assert array.tobytes() == new.tobytes()
    if norm_of(trained, received) <= max_norm * (1 - 1e-12):
        assert all(found[name] is trained[name] for name in trained)


def test_a_clipped_change_is_scaled_over_all_tensors_together() -> None:
    received = {"a": np.zeros(2), "b": np.zeros((BLOCK + 1,), "f4")}
    trained = {"a": np.array([3.0, 0.0]), "b": np.zeros((BLOCK + 1,), "f4")}
    trained["b"][-1] = 4.0
    found = FILTERS.create("clip_norm", {"max_norm": 1.0})(trained, received)
    np.testing.assert_allclose(found["a"], [0.6, 0.0])
    np.testing.assert_allclose(found["b"][-1], 0.8, rtol=1e-6)


def test_rounding_to_a_coarse_dtype_never_exceeds_the_bound() -> None:
    received = {"a": np.full(100, 1e6, "f4")}  # neighbours there are 0.0625 apart
    trained = {"a": np.full(100, 1e6 + 1, "f4")}
    found = FILTERS.create("clip_norm", {"max_norm": 0.4})(trained, received)
    assert norm_of(found, received) <= 0.4


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_change_without_a_norm_does_not_leave(bad: float) -> None:
    with pytest.raises(ModelFormatError, match="norm of the change is") as caught:
        FILTERS.create("clip_norm", {"max_norm": 1.0})({"a": np.array([bad])}, {"a": np.zeros(1)})
    assert caught.value.rule == "clip_norm"


def test_excluded_tensors_leave_as_they_came() -> None:
    received = {"bn.mean": np.zeros(2), "head": np.zeros(2)}
    trained = {"bn.mean": np.ones(2), "head": np.ones(2)}
    found = FILTERS.create("exclude_vars", {"pattern": r"^bn\."})(trained, received)
    assert found["bn.mean"] is received["bn.mean"]
    assert found["head"] is trained["head"]


@pytest.mark.parametrize(
    ("name", "args", "field"),
    [
        ("clip_norm", {"max_norm": 0}, "args.max_norm"),
        ("clip_norm", {"max_norm": float("inf")}, "args.max_norm"),
        ("clip_norm", {}, "args.max_norm"),
        ("exclude_vars", {"pattern": ""}, "args.pattern"),
        ("exclude_vars", {"pattern": "["}, "args.pattern"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        FILTERS.create(name, args)
    assert caught.value.field == field
