"""Digests: blake3 for blobs, which are hashed on the hot path; they carry their algorithm."""

import os
from pathlib import Path

from blake3 import blake3

from flplatform.core.errors import DataLossError

STEP_BYTES = 4 << 20


class Digest:
    """An incremental blob digest."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    def text(self) -> str:
        """Return `blake3:` and the hex digest of everything added."""
        return f"blake3:{self._hash.hexdigest()}"


def digest_of(data: bytes) -> str:
    """Return the digest of `data`."""
    digest = Digest()
    digest.update(data)
    return digest.text()


def digest_of_file(path: Path) -> tuple[str, int]:
    """Return digest and size in bytes of a file, read in steps."""
    digest = Digest()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(STEP_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return digest.text(), os.fstat(file.fileno()).st_size


def demand_digest(path: Path, digest: str) -> None:
    """Refuse a file that is not the blob it is named for.

    Raises:
        DataLossError: its bytes have another digest.
        OSError: it cannot be read.
    """
    found, size = digest_of_file(path)
    if found != digest:
        raise DataLossError(
            f"{path} has {size} bytes with digest {found}, not {digest}",
            hint="fl_state verify --deep finds all that is damaged; restore it from a backup",
        )
