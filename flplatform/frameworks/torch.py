"""PyTorch: a module's state dict as named arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
        ValueError: the state dict has something that is no tensor, or a dtype unknown to NumPy
            (bfloat16).
    """
    state = _state(module)
    _forms(state)
    # .copy() because on the CPU .numpy() shares memory with the module.
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}


def load_arrays(module: "torch.nn.Module", arrays: Mapping[str, Array]) -> None:
    """Copies `arrays` into the module's parameters and buffers, on whichever device they are.

    Raises:
        ValueError: names, shapes or dtypes are not exactly the module's; nothing is loaded then.
    """
    import torch  # noqa: PLC0415 - importing this module must not need torch

    check_fit(_forms(_state(module)), arrays)
    # np.array copies: received arrays are read-only, which torch has no notion of.
    module.load_state_dict({name: torch.from_numpy(np.array(arrays[name])) for name in arrays})


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
            dtype = tensor.new_empty(0, device="cpu").numpy().dtype.name
        except TypeError:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which NumPy lacks") from None
        forms[name] = (tuple(tensor.shape), dtype)
    return forms
