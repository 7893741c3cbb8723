import numpy as np
import pytest

from flplatform.frameworks.fit import check_fit

EXPECTED = {"a": ((2, 3), "float32"), "b": ((), "int64"), "any": None}


def arrays(**changes):
    fitting = {"a": np.zeros((2, 3), np.float32), "b": np.array(1), "any": np.zeros(5)}
    return {name: array for name, array in (fitting | changes).items() if array is not None}


def test_what_fits_passes():
    check_fit(EXPECTED, arrays())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": None}, "tensor 'b' of the model is missing; given: a, any"),
        ({"c": np.zeros(1)}, "the model has no tensor 'c'; it has: a, b, any"),
        ({"a": np.zeros((3, 2), np.float32)}, r"'a' is float32 \(3, 2\), .* has float32 \(2, 3\)"),
        ({"a": np.zeros((2, 3))}, r"'a' is float64 \(2, 3\), the model has float32 \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        check_fit(EXPECTED, arrays(**changes))


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"it has: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … \(12 in all\)"):
        check_fit(
            {str(n): None for n in range(12)}, {str(n): np.zeros(1) for n in [*range(12), "x"]}
        )
