"""Blob digests."""

import os
from pathlib import Path

import pytest

from flplatform.core.model import check_digest
from flplatform.files.digest import STEP_BYTES, Digest, digest_of, digest_of_file

EMPTY = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_the_digest_names_its_algorithm() -> None:
    assert digest_of(b"") == EMPTY  # from the BLAKE3 specification's test vectors
    assert check_digest(digest_of(b"abc"))


def test_pieces_and_whole_agree() -> None:
    data = os.urandom(10_000)
    digest = Digest()
    for start in range(0, len(data), 999):
        digest.update(memoryview(data)[start : start + 999])
    assert digest.text() == digest_of(data)


@pytest.mark.parametrize("size", [0, 1, STEP_BYTES, STEP_BYTES + 1])
def test_a_file_is_digested_in_steps(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert digest_of_file(tmp_path / "file") == (digest_of(data), size)
