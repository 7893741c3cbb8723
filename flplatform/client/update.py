"""Changes and partial models: what a job's code returned, and the whole model that it stands for.

Sums and differences are taken in float64 and rounded once to the tensor's dtype, as the server
does it.
"""

from collections.abc import Callable, Collection

import numpy as np

from flplatform.core.errors import ModelFormatError
from flplatform.core.model import Array, Arrays, is_float

_STEP = 1 << 18


def whole_model(received: Arrays, returned: Arrays, *, delta: bool) -> dict[str, Array]:
    """Return the trained model: what was received, with what was returned in it.

    Args:
        received: the model that training started from.
        returned: all or some of its tensors, or, with `delta`, their changes; a bool tensor has
            none and stays.
        delta: whether `returned` holds changes.

    Raises:
        ModelFormatError: a sum is beyond its tensor's dtype.
    """
    if not delta:
        return {**received, **returned}
    return {
        name: _combined(np.add, base, returned[name], name)
        if name in returned and base.dtype != np.bool_
        else base
        for name, base in received.items()
    }


def update_of(
    whole: Arrays, received: Arrays, names: Collection[str], *, delta: bool
) -> dict[str, Array]:
    """Return what is sent of a trained model; undoes `whole_model` but for rounding.

    Args:
        whole: the trained model.
        received: the model that training started from.
        names: the tensors that are sent.
        delta: whether changes are sent.

    Raises:
        ModelFormatError: a change is beyond its tensor's dtype.
    """
    if not delta:
        return {name: whole[name] for name in names}
    return {
        name: np.zeros_like(whole[name])
        if whole[name].dtype == np.bool_
        else _combined(np.subtract, whole[name], received[name], name)
        for name in names
    }


def _combined(combine: Callable[..., Array], one: Array, other: Array, name: str) -> Array:
    result = np.empty(one.shape, one.dtype)
    flat, first, second = result.reshape(-1), one.reshape(-1), other.reshape(-1)
    for start in range(0, flat.size, _STEP):
        cut = slice(start, start + _STEP)
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            wide = combine(first[cut].astype(np.float64), second[cut].astype(np.float64))
            if is_float(one.dtype):
                flat[cut] = wide
                fits = bool(np.isfinite(flat[cut]).all())
            else:
                limits = np.iinfo(one.dtype.str)
                # As floats: 2^63 would else be taken for the largest int64.
                fits = bool((wide >= float(limits.min)).all() and (wide < limits.max + 1.0).all())
                flat[cut] = wide if fits else 0
        if not fits:
            raise ModelFormatError(
                f"with its change it is beyond {one.dtype.name}", field=f"model[{name!r}]"
            )
    return result
