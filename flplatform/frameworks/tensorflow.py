"""TensorFlow: a Keras model's weights as named arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flplatform.frameworks.fit import Array, check_fit

if TYPE_CHECKING:
    import keras


def arrays_of(model: "keras.Model") -> dict[str, Array]:
    """Copies the model's weights, the non-trainable ones (moving averages) included.

    Returns:
        Arrays named by layer and variable ("linear/kernel"), with the variables' shapes and
        dtypes. Give layers names of your own: Keras numbers the names it makes up ("dense_3")
        by what the process built before, so that they differ between sites.

    Raises:
        ValueError: the model is not built yet, or two variables have one name.
    """
    return {name: np.array(variable.numpy()) for name, variable in _variables(model).items()}


def load_arrays(model: "keras.Model", arrays: Mapping[str, Array]) -> None:
    """Copies `arrays` into the model's weights.

    Raises:
        ValueError: names, shapes or dtypes are not exactly the model's; nothing is loaded then.
    """
    variables = _variables(model)
    check_fit({name: (tuple(v.shape), v.dtype) for name, v in variables.items()}, arrays)
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _variables(model: "keras.Model") -> "dict[str, keras.Variable]":
    if not model.weights:
        raise ValueError(f"model {model.name!r} has no weights yet: build it or give it an Input")
    variables: dict[str, keras.Variable] = {}
    for variable in model.weights:
        # The model's own name comes first in some kinds of models, and Keras numbers it too.
        name = variable.path.removeprefix(f"{model.name}/")
        if name in variables:
            raise ValueError(f"two variables are called {name!r}: name the layers differently")
        variables[name] = variable
    return variables
