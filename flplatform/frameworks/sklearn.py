"""scikit-learn: the coefficients of a linear model as named arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flplatform.frameworks.fit import Array, Form, check_fit

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

NAMES = ("coef_", "intercept_")


def arrays_of(model: "BaseEstimator") -> dict[str, Array]:
    """Copies what a fitted linear model has learnt.

    Returns:
        "coef_" (features,) or (outputs, features) and "intercept_" () or (outputs,), in the
        model's own dtype, mostly float64.

    Raises:
        ValueError: the model is not fitted, or holds something other than dense numbers.
    """
    arrays = {}
    for name in NAMES:
        if not hasattr(model, name):
            raise ValueError(f"{type(model).__name__} has no {name!r}: it is not fitted")
        arrays[name] = np.array(getattr(model, name))
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{name!r} of {type(model).__name__} is no dense array of floats")
    return arrays


def load_arrays(model: "BaseEstimator", arrays: Mapping[str, Array]) -> None:
    """Copies `arrays` into the model; a classifier needs its `classes_` set besides.

    A model that is not fitted has no shapes yet and takes any.

    Raises:
        ValueError: names are not `NAMES`, or shapes or dtypes are not those of the fitted
            model; nothing is loaded then.
    """
    forms: dict[str, Form | None] = dict.fromkeys(NAMES)
    if all(hasattr(model, name) for name in NAMES):
        forms |= {name: (a.shape, a.dtype.name) for name, a in arrays_of(model).items()}
    check_fit(forms, arrays)
    for name in NAMES:
        setattr(model, name, np.array(arrays[name]))
