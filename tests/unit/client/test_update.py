"""Changes and parts, and the whole model that they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings

from flplatform.client import update as module
from flplatform.client.update import update_of, whole_model
from flplatform.core.errors import ModelFormatError
from flplatform.core.model import Arrays
from tests.support.models import arrays_of, small_model


def test_a_part_is_put_into_what_was_received() -> None:
    received = small_model()
    whole = whole_model(received, {"d.weight": np.ones((3, 5), "f4")}, delta=False)
    assert whole.keys() == received.keys()
    assert (whole["d.weight"] == 1).all()
    assert whole["b.half"] is received["b.half"]


def test_a_change_is_added_once_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP", 2)
    received = {"w": np.array([1, 2, 3], "f4"), "n": np.array([5, -5, 0], "i4")}
    change = {"w": np.array([2.0**-24, 0.5, -3], "f4"), "n": np.array([1, -1, 7], "i4")}
    whole = whole_model(received, change, delta=True)
    np.testing.assert_array_equal(whole["w"], np.array([1, 2.5, 0], "f4"))
    np.testing.assert_array_equal(whole["n"], np.array([6, -6, 7], "i4"))
    assert whole["w"].dtype == np.float32


def test_a_bool_tensor_has_no_change() -> None:
    received = {"flag": np.array([True, False])}
    whole = whole_model(received, {"flag": np.array([True, True])}, delta=True)
    np.testing.assert_array_equal(whole["flag"], received["flag"])
    sent = update_of(whole, received, ["flag"], delta=True)
    np.testing.assert_array_equal(sent["flag"], [False, False])


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (np.float32(3e38), np.float32(3e38)),
        (np.uint8(200), np.uint8(100)),
        (np.int8(-128), np.int8(-1)),
        (np.int64(2**63 - 1), np.int64(2**62)),
    ],
)
def test_what_is_beyond_the_dtype_is_refused_by_name(base: np.generic, change: np.generic) -> None:
    with pytest.raises(ModelFormatError, match="with its change it is beyond") as caught:
        whole_model({"w": np.array([base])}, {"w": np.array([change])}, delta=True)
    assert caught.value.field == "model['w']"


@settings(deadline=None, max_examples=50)
@given(arrays=arrays_of(("F32", "I32", "I8", "BOOL", "F16")))
def test_no_change_gives_what_was_received(arrays: Arrays) -> None:
    nothing = {name: np.zeros_like(array) for name, array in arrays.items()}
    whole = whole_model(arrays, nothing, delta=True)
    for name, array in arrays.items():
        np.testing.assert_array_equal(whole[name], array)
        assert whole[name].dtype == array.dtype
    for name, change in update_of(whole, arrays, arrays.keys(), delta=True).items():
        np.testing.assert_array_equal(change, nothing[name])
    assert update_of(whole, arrays, list(arrays)[:1], delta=False).keys() == set(list(arrays)[:1])
