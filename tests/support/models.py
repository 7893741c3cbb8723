"""Small models for tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flplatform.core.model import DTYPES, METADATA, Array, Arrays
from flplatform.files import modelfile


def small_model(seed: int = 0) -> dict[str, Array]:
    """Tensors of every float width, odd sizes, so that values lie at odd offsets."""
    rng = np.random.default_rng(seed)
    return {
        "a.flag": np.array([True, False, True]),
        "b.half": rng.standard_normal(7).astype("f2"),
        "c.bytes": rng.integers(0, 255, 5).astype("u1"),
        "d.weight": rng.standard_normal((3, 5)).astype("f4"),
        "e.empty": np.zeros((0, 4), "f4"),
        "f.scalar": np.array(rng.standard_normal(), "f8"),
        "g.steps": np.array(41 + seed, "i8"),
    }


def model_bytes(arrays: Arrays, folder: Path) -> bytes:
    """Return the canonical file of `arrays`."""
    path = folder / "model"
    modelfile.save(path, arrays)
    data = path.read_bytes()
    path.unlink()
    return data


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12
).filter(lambda name: name != METADATA)
"""Printable tensor names in any script."""


NUMPY_DTYPES = tuple(code for code in DTYPES if code != "BF16")
"""Those that the numpy flavour of safetensors reads."""


def arrays_of(
    dtypes: tuple[str, ...] = tuple(DTYPES), finite: bool = True
) -> st.SearchStrategy[Mapping[str, Array]]:
    """Models of one to five small tensors of the given dtype codes."""
    array = st.sampled_from(dtypes).flatmap(
        lambda code: values_of(
            code, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), finite
        )
    )
    return st.dictionaries(NAMES, array, min_size=1, max_size=5)


def values_of(
    code: str, shape: st.SearchStrategy[tuple[int, ...]] | int, finite: bool = True
) -> st.SearchStrategy[Array]:
    """Tensors of a dtype code; bfloat16, which Hypothesis does not know, by its bits."""
    if code != "BF16":
        dtype = DTYPES[code]
        elements = npst.from_dtype(dtype, allow_nan=not finite, allow_infinity=not finite)
        return npst.arrays(dtype, shape, elements=elements)
    bits = st.integers(0, 0xFFFF)
    if finite:
        bits = bits.filter(lambda value: value & 0x7F80 != 0x7F80)
    return npst.arrays("<u2", shape, elements=bits).map(lambda array: array.view(DTYPES[code]))
