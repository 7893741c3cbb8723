"""Tiny models, and what training and aggregation make of them: functions of their inputs alone."""

import struct
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

from flplatform.core.events import RoundClosed
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, TensorSpec, encode_header
from flplatform.files.digest import digest_of

MANIFEST = Manifest((TensorSpec("w", "F32", (6,)),))
HEADER = encode_header(MANIFEST)
SIZE = MANIFEST.file_bytes()


def model(*values: float) -> bytes:
    """Return a model file."""
    return HEADER + struct.pack("<6f", *values)


def values_of(data: bytes) -> tuple[float, ...]:
    """Return the values of a model file."""
    return struct.unpack("<6f", data[len(HEADER) :])


def ref(data: bytes) -> ModelRef:
    """Return digest and size of a file."""
    return ModelRef(digest_of(data), len(data))


def trained(received: bytes, seed: int, site: str, state: bytes, nonce: str = "") -> bytes:
    """Return the update of a site."""
    text = f"{digest_of(received)}/{seed}/{site}/{state.hex()}/{nonce}"
    numbers = struct.unpack("<6H", sha256(text.encode()).digest()[:12])
    return model(*(number / 256 for number in numbers))


def state_after(state: bytes, seed: int) -> bytes:
    """Return what the job's code keeps after a train task."""
    return sha256(state + str(seed).encode()).digest()


def mean(contributions: Iterable[tuple[float, bytes]]) -> bytes:
    """Return the weighted mean of updates, in the order given."""
    found = [(weight, values_of(data)) for weight, data in contributions]
    total = sum(weight for weight, _ in found)
    return model(*(sum(weight * values[at] for weight, values in found) / total for at in range(6)))


def combined(closed: RoundClosed, read: Callable[[str], bytes]) -> bytes:
    """Return the model of a closed round."""
    return mean((each.weight, read(each.digest)) for each in closed.contributions)


def aggregate_closed(blobs: Any, closed: RoundClosed, _pool: Any) -> tuple[ModelRef, None]:
    """Stand for `server.aggregation.aggregate_closed`."""
    data = combined(closed, lambda digest: blobs.path(digest).read_bytes())
    return blobs.create(lambda path: path.write_bytes(data)), None
