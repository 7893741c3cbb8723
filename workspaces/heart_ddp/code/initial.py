"""The first model. NumPy only: this runs on the admin's machine, which may have nothing else."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from heart_data import FEATURES


def initial_model(args: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:  # noqa: ARG001 - the platform's signature
    """Draws what torch draws for `Linear(13, 1)` after `manual_seed(seed)`, as the job heart does.

    Returns:
        "linear.weight", float32 (1, 13), and "linear.bias", float32 (1,).
    """
    inputs = len(FEATURES)
    twister = np.random.RandomState(seed % 2**32)
    draws = twister.randint(0, 2**32, inputs + 1, dtype=np.uint32) & 0xFFFFFF
    bound = float(np.float32(1 / np.sqrt(inputs)))
    values = (draws * (2 * bound / 2**24) - bound).astype(np.float32)
    return {"linear.weight": values[np.newaxis, :inputs], "linear.bias": values[inputs:]}
