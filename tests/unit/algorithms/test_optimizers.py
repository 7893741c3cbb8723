"""Server optimisers: against the published recursions, in plain Python floats."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.algorithms.aggregators import AGGREGATORS
from flplatform.algorithms.optimizers import OPTIMIZERS
from flplatform.algorithms.tiles import Recipe, aggregate
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import DTYPES, Arrays, Manifest
from flplatform.core.ports import Contribution

MEAN = AGGREGATORS.create("weighted_mean", {})
NAMES = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")


def recipe(name: str, args: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return Recipe(MEAN, optimizer=OPTIMIZERS.create(name, args or {}), **more)


class Reference:
    """One coordinate, as the papers write it."""

    def __init__(self, name: str, rate: float, b1: float, b2: float, tau: float) -> None:
        self.name, self.rate, self.b1, self.b2, self.tau = name, rate, b1, b2, tau
        self.m, self.v = 0.0, 0.0 if name == "fedavgm" else tau * tau

    def step(self, x: float, mean: float) -> float:
        change = mean - x
        if self.name == "fedavgm":
            self.v = self.b1 * self.v + change
            return x + self.rate * self.v
        self.m = self.b1 * self.m + (1 - self.b1) * change
        square = change * change
        match self.name:
            case "fedadagrad":
                self.v += square
            case "fedadam":
                self.v = self.b2 * self.v + (1 - self.b2) * square
            case "fedyogi":
                sign = (self.v > square) - (self.v < square)
                self.v -= (1 - self.b2) * square * sign
        return x + self.rate * self.m / (math.sqrt(self.v) + self.tau)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(
    means=st.lists(st.floats(-100, 100), min_size=1, max_size=6),
    rate=st.floats(0.01, 2),
    b1=st.floats(0, 0.99),
    b2=st.floats(0, 0.999),
)
def test_rounds_follow_the_published_recursion(
    name: str, means: list[float], rate: float, b1: float, b2: float
) -> None:
    args = {"learning_rate": rate}
    args |= {"momentum": b1} if name == "fedavgm" else {"beta_1": b1, "beta_2": b2, "tau": 1e-3}
    reference, model, state = Reference(name, rate, b1, b2, 1e-3), {"w": np.array([0.5])}, None
    expected = 0.5
    for mean in means:
        update = Contribution("a", 3.0, {"w": np.array([mean])})
        model, state = aggregate(recipe(name, args), model, [update], state)
        expected = reference.step(expected, mean)
        assert model["w"][0] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert state is not None
    assert state["v/w"][0] == pytest.approx(reference.v, rel=1e-9, abs=1e-12)


def test_momentum_without_memory_is_the_mean() -> None:
    model = {"w": np.array([1.0, -2.0], "f4")}
    update = Contribution("a", 1.0, {"w": np.array([0.25, 7.0], "f4")})
    found, _ = aggregate(recipe("fedavgm", {"momentum": 0.0}), model, [update])
    assert found["w"].tolist() == [0.25, 7.0]


@pytest.mark.parametrize("name", NAMES)
def test_only_float_tensors_that_are_not_excluded_have_a_state(name: str) -> None:
    aggregator = AGGREGATORS.create("weighted_mean", {"exclude_vars": "out"})
    optimizer = OPTIMIZERS.create(name, {})
    base = {
        "b": np.zeros(3, DTYPES["BF16"]), "d": np.zeros(3, "f8"), "h": np.zeros(3, "f2"),
        "n": np.zeros(3, "i8"), "out": np.zeros(3, "f4"), "w": np.zeros(3, "f4"),
    }  # fmt: skip
    update = {key: np.ones_like(array) for key, array in base.items()}
    both = Recipe(aggregator, optimizer=optimizer)
    found, state = aggregate(both, base, [Contribution("a", 1.0, update)])
    assert state.keys() == {f"{slot}/{key}" for slot in optimizer.slots for key in "bdhw"}
    assert {str(array.dtype) for key, array in state.items() if key.endswith("d")} == {"float64"}
    assert {str(array.dtype) for key, array in state.items() if key[-1] != "d"} == {"float32"}
    assert Manifest.of(state) == both.state_manifest(Manifest.of(base))
    assert found["n"].tolist() == [1, 1, 1]
    assert found["out"].tolist() == [0, 0, 0]
    for key in "bdhw":
        assert (found[key] > 0).all()
    integers = Manifest.of({"n": np.zeros(3, "i8")})
    with pytest.raises(InvalidArgumentError, match="no float tensor"):
        both.check(integers, 1)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_tensor_that_nobody_sent_keeps_value_and_state(name: str | None) -> None:
    base: Arrays = {"a": np.array([-0.0, 2.0], "f4"), "b": np.array([3.0], "f4")}
    made = recipe(name) if name else Recipe(MEAN)
    both = [Contribution("x", 1.0, {"a": np.ones(2, "f4"), "b": np.ones(1, "f4")})]
    _, state = aggregate(made, base, both)
    partial = [Contribution("x", 1.0, {"b": np.array([5.0], "f4")})]
    found, after = aggregate(made, base, partial, state or None)
    assert found["a"].tobytes() == base["a"].tobytes()
    assert found["b"].tobytes() != base["b"].tobytes()
    for key, array in after.items():
        assert (array.tobytes() == state[key].tobytes()) is key.endswith("a")


def test_a_mean_over_those_who_sent_the_tensor() -> None:
    base = {"a": np.zeros(1), "b": np.zeros(1)}
    updates = [
        Contribution("x", 1.0, {"a": np.array([2.0]), "b": np.array([8.0])}),
        Contribution("y", 3.0, {"a": np.array([6.0])}),
    ]
    found, _ = aggregate(Recipe(MEAN), base, updates)
    assert (found["a"][0], found["b"][0]) == (5.0, 8.0)


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize(
    ("aggregator", "args"),
    [("weighted_mean", {}), ("weighted_mean", {"max_norm": 1.0})],
)
def test_changes_give_what_models_give(
    name: str | None, aggregator: str, args: dict[str, Any]
) -> None:
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal(50)}
    full = [Contribution(str(n), n + 1.0, {"w": rng.standard_normal(50)}) for n in range(3)]
    changes = [
        Contribution(each.site, each.weight, {"w": each.arrays["w"] - base["w"]}) for each in full
    ]
    rule = AGGREGATORS.create(aggregator, args)
    optimizer = OPTIMIZERS.create(name, {}) if name else None
    one, _ = aggregate(Recipe(rule, optimizer=optimizer), base, full)
    other, _ = aggregate(Recipe(rule, delta=True, optimizer=optimizer), base, changes)
    np.testing.assert_allclose(other["w"], one["w"], rtol=1e-9, atol=1e-12)


def test_changes_of_integers_and_what_has_none() -> None:
    base = {"n": np.array([5, 120], "i1"), "w": np.array([1.0, -0.0])}
    change = {"n": np.array([-2, 7], "i1"), "w": np.array([0.0, 0.0])}
    found, _ = aggregate(Recipe(MEAN, delta=True), base, [Contribution("a", 1.0, change)])
    assert found["n"].tolist() == [3, 127]
    change["n"][1] = 8
    with pytest.raises(ModelFormatError, match="beyond int8"):
        aggregate(Recipe(MEAN, delta=True), base, [Contribution("a", 1.0, change)])
    for dtype in ("u1", "?"):
        with pytest.raises(InvalidArgumentError):
            Recipe(MEAN, delta=True).check(Manifest.of({"n": np.zeros(1, dtype)}), 1)
    keeping = AGGREGATORS.create("weighted_mean", {"exclude_vars": "n"})
    Recipe(keeping, delta=True).check(Manifest.of({"n": np.zeros(1, "u1"), "w": base["w"]}), 1)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_result_beyond_its_dtype_is_refused(dtype: str) -> None:
    base = {"w": np.zeros(2, DTYPES[dtype])}
    large = np.full(2, 6e4 if dtype == "F16" else 3e38, DTYPES[dtype])
    update = Contribution("a", 1.0, {"w": large})
    with pytest.raises(ModelFormatError, match="beyond") as caught:
        aggregate(recipe("fedavgm", {"learning_rate": 10.0}), base, [update])
    assert caught.value.field.endswith("w']")


@pytest.mark.parametrize(
    ("name", "args", "field"),
    [
        ("fedadam", {"beta_1": 1.0}, "args.beta_1"),
        ("fedadam", {"tau": 0.0}, "args.tau"),
        ("fedavgm", {"momentum": -0.1}, "args.momentum"),
        ("fedavgm", {"learning_rate": 0.0}, "args.learning_rate"),
        ("fedyogi", {"momentum": 0.5}, "args.momentum"),
    ],
)
def test_wrong_arguments_are_named(name: str, args: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        OPTIMIZERS.create(name, args)
    assert caught.value.field == field
