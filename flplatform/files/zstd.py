"""One zstd frame per file, written with its content's size and read within it.

What is read may come from anybody: a frame that asks for more memory than `WINDOW_BYTES`, that
holds more than its header says, that ends early or is followed by anything is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import zstandard

from flplatform.core.errors import ModelFormatError

LEVEL = 3
WINDOW_BYTES = 8 << 20
"""Most memory that a frame may ask its reader for; `LEVEL` needs 2 MiB."""

BATCH_BYTES = 1 << 20
_HEADER_BYTES = 18
_SLICE_BYTES = 2 << 10
"""Read at a time: so many bytes come to 64 MiB at most, whatever they are."""


def compress_bound(size: int) -> int:
    """Return the most bytes that a frame of `size` bytes takes, as zstd defines it."""
    return size + (size >> 8) + (((128 << 10) - size) >> 11 if size < 128 << 10 else 0)


def compress(source: Path, target: Path) -> None:
    """Write the file `source` as one frame to `target`, which must not exist.

    Raises:
        OSError: the disk refused.
    """
    size = source.stat().st_size
    with source.open("rb") as file, target.open("xb") as out:
        zstandard.ZstdCompressor(LEVEL).copy_stream(file, out, size=size)


def content_size(path: Path) -> int:
    """Return how many bytes the frame in a file says that it holds.

    Raises:
        ModelFormatError: it is no frame of this kind.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        begin = file.read(_HEADER_BYTES)
    try:
        frame = zstandard.get_frame_parameters(begin)
    except zstandard.ZstdError:
        raise ModelFormatError("is no zstd frame", field="zstd") from None
    if frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise ModelFormatError("does not say how much it holds", field="zstd")
    if frame.window_size > WINDOW_BYTES or frame.dict_id:
        raise ModelFormatError(
            f"asks for a window of {frame.window_size} bytes or a dictionary", field="zstd"
        )
    return int(frame.content_size)


def decompress(path: Path, size: int) -> Iterator[bytes]:
    """Yield the content of a file's one frame, piece by piece.

    Args:
        path: the file.
        size: what the frame must hold, in bytes; see `content_size`.

    Raises:
        ModelFormatError: the frame is damaged, holds more or less, or something follows it.
        OSError: the file cannot be read.
    """
    reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj(
        write_size=32 << 10
    )
    total, batch = 0, bytearray()
    with path.open("rb") as file:
        while piece := file.read(_SLICE_BYTES):
            if reader.eof:
                raise ModelFormatError("bytes follow the frame", field="zstd")
            try:
                batch += reader.decompress(piece)
            except zstandard.ZstdError as error:
                raise ModelFormatError(f"is damaged: {error}", field="zstd") from None
            if total + len(batch) > size:
                raise ModelFormatError(f"holds more than {size} bytes", field="zstd")
            if len(batch) >= BATCH_BYTES:
                total += len(batch)
                yield bytes(batch)
                batch.clear()
    if reader.unused_data:
        raise ModelFormatError("bytes follow the frame", field="zstd")
    if not reader.eof or total + len(batch) != size:
        raise ModelFormatError(f"ends after {total + len(batch)} of {size} bytes", field="zstd")
    yield bytes(batch)
