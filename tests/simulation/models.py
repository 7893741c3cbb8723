"""Tiny models, and what training, codecs and aggregation make of them: functions of their inputs.

Computed in memory, by the program's own arithmetic: what the programs leave in files must be the
same bytes.
"""

import struct
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import zstandard

from flplatform.algorithms.codecs import decode, encode, split_codec, wire_manifest
from flplatform.algorithms.recipes import recipe_of_round
from flplatform.algorithms.tiles import Recipe, Write, aggregate
from flplatform.client.update import whole_model
from flplatform.core.events import RoundClosed
from flplatform.core.messages import ModelRef
from flplatform.core.model import (
    DTYPES,
    LENGTH_BYTES,
    Array,
    Arrays,
    Manifest,
    TensorSpec,
    encode_header,
    header_length,
    parse_header,
)
from flplatform.core.ports import Contribution
from flplatform.files.digest import digest_of

MANIFEST = Manifest((TensorSpec("w", "F32", (6,)),))
HEADER = encode_header(MANIFEST)


def model(*values: float) -> bytes:
    """Return a model file."""
    return HEADER + struct.pack("<6f", *values)


def values_of(data: bytes) -> tuple[float, ...]:
    """Return the values of a model file."""
    return struct.unpack("<6f", data[len(HEADER) :])


def arrays_of(data: bytes) -> dict[str, Array]:
    """Return the tensors of any model file."""
    if data.startswith(HEADER):
        return {"w": np.frombuffer(data, "<f4", offset=len(HEADER))}
    length = header_length(data[:LENGTH_BYTES])
    return parse_header(data[:length], len(data)).views(memoryview(data))


def file_of(arrays: Arrays) -> bytes:
    """Return the model file of any tensors."""
    manifest = Manifest.of(arrays)
    values = (arrays[spec.name].astype(DTYPES[spec.dtype]) for spec in manifest.tensors)
    return encode_header(manifest) + b"".join(array.tobytes() for array in values)


def ref(data: bytes) -> ModelRef:
    """Return digest and size of a file."""
    return ModelRef(digest_of(data), len(data))


# ---- training ------------------------------------------------------------------------------------


def trained(received: bytes, seed: int, site: str, state: bytes, nonce: str = "") -> bytes:
    """Return what training at a site makes: a model, or a change."""
    text = f"{digest_of(received)}/{seed}/{site}/{state.hex()}/{nonce}"
    numbers = struct.unpack("<6H", sha256(text.encode()).digest()[:12])
    return model(*(number / 256 for number in numbers))


def whole(received: bytes, change: bytes) -> bytes:
    """Return the model that a change makes of what was received."""
    return file_of(whole_model(arrays_of(received), arrays_of(change), delta=True))


def state_after(state: bytes, seed: int) -> bytes:
    """Return what the job's code keeps after a train task."""
    return sha256(state + str(seed).encode()).digest()


def accuracy(data: bytes) -> float:
    """Return what measuring a model finds."""
    return values_of(data)[0] % 1.0


# ---- codecs --------------------------------------------------------------------------------------


def encoded(name: str, data: bytes, base: bytes | None = None) -> bytes:
    """Return a model, or its change from `base`, as a codec sends it."""
    codec, packed = split_codec(name)
    if codec != "none":
        arrays = arrays_of(data)
        specs = wire_manifest(codec, MANIFEST).tensors
        found = {spec.name: np.zeros(spec.shape, DTYPES[spec.dtype]) for spec in specs}
        encode(codec, MANIFEST, arrays, arrays_of(base) if base else None, _into(found))
        data = file_of(found)
    return zstandard.ZstdCompressor().compress(data) if packed else data


def decoded(name: str, data: bytes, base: bytes | None = None, base_codec: str = "none") -> bytes:
    """Undo `encoded`; `base` had come to who encoded by `base_codec`."""
    codec, packed = split_codec(name)
    if packed:
        data = zstandard.ZstdDecompressor().decompress(data)
    if codec == "none":
        return data
    found: dict[str, Array] = {"w": np.zeros(6, "<f4")}
    known = arrays_of(base) if base else None
    decode(codec, MANIFEST, arrays_of(data), known, _into(found), split_codec(base_codec)[0])
    return file_of(found)


def _into(arrays: Arrays) -> Write:
    def write(name: str, start: int, values: Array) -> None:
        arrays[name].reshape(-1)[start : start + values.size] = values

    return write


# ---- aggregation ---------------------------------------------------------------------------------


def combine(
    recipe: Recipe,
    base: bytes,
    updates: list[tuple[str, float, bytes]],
    state: bytes | None,
) -> tuple[bytes, bytes | None]:
    """Return the model of a round, and the state of its optimiser if there is one.

    Args:
        recipe: how to combine.
        base: the round's model.
        updates: site, weight and file of each.
        state: of the optimiser before the round.
    """
    found = [Contribution(site, weight, arrays_of(data)) for site, weight, data in updates]
    arrays, states = aggregate(recipe, arrays_of(base), found, arrays_of(state) if state else None)
    return file_of(arrays), file_of(states) if states else None


def combined(closed: RoundClosed, read: Callable[[str], bytes]) -> tuple[bytes, bytes | None]:
    """Return the model and the optimiser's state of a closed round."""
    return combine(
        recipe_of_round(closed),
        read(closed.base.digest),
        [(each.site, each.weight, read(each.digest)) for each in closed.contributions],
        read(closed.optimizer_state.digest) if closed.optimizer_state else None,
    )
