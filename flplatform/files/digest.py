"""Digests: blake3 for blobs, which are hashed on the hot path; they carry their algorithm."""

import os
from pathlib import Path

from blake3 import blake3

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
