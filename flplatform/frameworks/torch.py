"""PyTorch: a module's state dict as named arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from flplatform.frameworks.fit import Array, Form, check_fit

if TYPE_CHECKING:
    import torch


def arrays_of(module: "torch.nn.Module") -> dict[str, Array]:
    """Copies the module's parameters and buffers.

    Returns:
        The state dict's tensors by its own names ("linear.weight"), with the same shapes and
        dtypes, on the CPU. Later training does not change them.

    Raises:
        ValueError: the state dict has something that is no tensor, or a dtype unknown to NumPy.
    """
    state = _state(module)
    _forms(state)
    # .copy() because on the CPU .numpy() shares memory with the module.
    return {name: _to_numpy(tensor.detach().cpu()).copy() for name, tensor in state.items()}


def load_arrays(module: "torch.nn.Module", arrays: Mapping[str, Array]) -> None:
    """Copies `arrays` into the module's parameters and buffers, on whichever device they are.

    Raises:
        ValueError: names, shapes or dtypes are not exactly the module's; nothing is loaded then.
    """
    import torch  # noqa: PLC0415 - importing this module must not need torch

    check_fit(_forms(_state(module)), arrays)

    def tensor(array: Array) -> torch.Tensor:
        array = np.array(array)  # received arrays are read-only, which torch has no notion of
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    module.load_state_dict({name: tensor(array) for name, array in arrays.items()})


def _to_numpy(tensor: "torch.Tensor") -> Array:
    """Return a CPU tensor's values as an array that shares its memory if it can.

    Raises:
        TypeError: NumPy has no such dtype.
    """
    import torch  # noqa: PLC0415 - importing this module must not need torch

    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    bits: Array = tensor.contiguous().view(torch.int16).numpy()
    return bits.view(ml_dtypes.bfloat16)


def _state(module: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    import torch  # noqa: PLC0415 - importing this module must not need torch

    state: dict[str, torch.Tensor] = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name!r} of the state dict is a {type(value).__name__}, no tensor")
    return state


def _forms(state: "Mapping[str, torch.Tensor]") -> dict[str, Form]:
    forms = {}
    for name, tensor in state.items():
        try:
            # An empty tensor of the same dtype: asks NumPy's name for it without moving data.
            dtype = _to_numpy(tensor.new_empty(0, device="cpu")).dtype.name
        except TypeError:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which NumPy lacks") from None
        forms[name] = (tuple(tensor.shape), dtype)
    return forms
