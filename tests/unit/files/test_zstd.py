"""zstd frames: there and back, and nothing that a stranger makes of them gets far."""

from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.core.errors import ModelFormatError
from flplatform.files.zstd import (
    BATCH_BYTES,
    WINDOW_BYTES,
    compress,
    compress_bound,
    content_size,
    decompress,
)


def frame(data: bytes, folder: Path) -> Path:
    source, target = folder / "source", folder / "frame"
    source.write_bytes(data)
    target.unlink(missing_ok=True)
    compress(source, target)
    return target


def read(path: Path, size: int | None = None) -> bytes:
    return b"".join(decompress(path, content_size(path) if size is None else size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zstd")


@settings(deadline=None)
@given(data=st.binary(min_size=1, max_size=300), times=st.integers(1, 20_000))
def test_there_and_back(folder: Path, data: bytes, times: int) -> None:
    path = frame(data * times, folder)
    assert path.stat().st_size <= compress_bound(len(data) * times)
    assert content_size(path) == len(data) * times
    assert read(path) == data * times


@settings(deadline=None, max_examples=300)
@given(position=st.integers(0, 10**6), byte=st.integers(1, 255), cut=st.booleans())
def test_damage_is_refused_or_yields_as_much(
    folder: Path, position: int, byte: int, cut: bool
) -> None:
    data = bytes(range(256)) * 30
    path = frame(data, folder)
    damaged = bytearray(path.read_bytes())
    position %= len(damaged)
    if cut:
        del damaged[position:]
    else:
        damaged[position] ^= byte
    path.write_bytes(damaged)
    try:
        found = read(path, len(data))
    except ModelFormatError:
        return
    assert not cut
    assert len(found) == len(data)


def test_a_bomb_ends_at_its_bound(folder: Path) -> None:
    path = frame(bytes(1 << 26), folder)
    assert path.stat().st_size < 10_000
    pieces = decompress(path, 1000)
    with pytest.raises(ModelFormatError, match="more than 1000 bytes"):
        next(pieces)


def test_more_than_one_batch(folder: Path) -> None:
    data = bytes(range(251)) * (3 * BATCH_BYTES // 251)
    assert read(frame(data, folder)) == data


@pytest.mark.parametrize("more", [b"x", b"(\xb5/\xfd", zstandard.compress(b""), bytes(5000)])
def test_what_follows_the_frame_is_refused(folder: Path, more: bytes) -> None:
    path = frame(b"data" * 100, folder)
    with path.open("ab") as file:
        file.write(more)
    with pytest.raises(ModelFormatError, match="bytes follow the frame"):
        read(path)


def test_a_frame_that_asks_for_much_memory_is_refused(folder: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=True)
    path = folder / "wide"
    path.write_bytes(
        zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(WINDOW_BYTES * 17))
    )
    with pytest.raises(ModelFormatError, match="asks for a window of"):
        content_size(path)


def test_a_frame_without_its_size_is_refused(folder: Path) -> None:
    path = folder / "unsized"
    path.write_bytes(zstandard.ZstdCompressor(write_content_size=False).compress(b"data"))
    with pytest.raises(ModelFormatError, match="does not say"):
        content_size(path)


@given(data=st.binary(max_size=40))
def test_what_is_no_frame_is_refused(folder: Path, data: bytes) -> None:
    path = folder / "nothing"
    path.write_bytes(b"\0" + data)
    with pytest.raises(ModelFormatError, match="no zstd frame"):
        content_size(path)
