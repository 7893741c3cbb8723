"""The check that all adapters share: do these arrays fit that model?"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Form = tuple[tuple[int, ...], str]
"""Shape and NumPy dtype name of a tensor."""


def check_fit(expected: Mapping[str, Form | None], arrays: Mapping[str, Array]) -> None:
    """Compares `arrays` with the names, shapes and dtypes that a model has.

    Args:
        expected: the form of each of the model's tensors; None takes any.
        arrays: what is to be loaded.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape or dtype; it names the
            first such tensor, and what the model and the arrays have.
    """
    for name in expected:
        if name not in arrays:
            raise ValueError(f"tensor {name!r} of the model is missing; given: {_list(arrays)}")
    for name, array in arrays.items():
        if name not in expected:
            raise ValueError(f"the model has no tensor {name!r}; it has: {_list(expected)}")
        form, given = expected[name], (array.shape, array.dtype.name)
        if form is not None and form != given:
            raise ValueError(f"tensor {name!r} is {_text(given)}, the model has {_text(form)}")


def _text(form: Form) -> str:
    shape, dtype = form
    return f"{dtype} {shape}"


def _list(names: Mapping[str, object]) -> str:
    shown = ", ".join(list(names)[:10])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 10 else shown or "none"
