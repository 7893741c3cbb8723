"""Files as they cross the wire: model files of a codec's tensors, perhaps in a zstd frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.core.model import Array, Manifest
from flplatform.files.durable import temporary_beside
from flplatform.files.modelfile import FoundCheck, ModelCheck, check_file
from flplatform.files.modelwriter import NewModel
from flplatform.files.zstd import compress, content_size, decompress

Fill = Callable[[Callable[[str, int, Array], None]], None]
"""Hands tiles to what it is given: a tensor's name, the first element, flat values."""

Check = Callable[[int], ModelCheck | FoundCheck]
"""Size in bytes of a model file -> what checks its bytes; raises ModelFormatError for the size."""


def write_model(target: Path, manifest: Manifest, fill: Fill) -> None:
    """Write a model file to `target`, which must not exist.

    Raises:
        FLError: what `fill` raises.
        OSError: the disk refused.
    """
    model = NewModel(manifest)
    with model.open(target):
        fill(model.write)


def write_wire(target: Path, manifest: Manifest, fill: Fill, *, packed: bool) -> None:
    """Write a model file, in a zstd frame if `packed`, to `target`, which must not exist.

    Raises:
        FLError: what `fill` raises.
        OSError: the disk refused.
    """
    if not packed:
        return write_model(target, manifest, fill)
    plain = temporary_beside(target)
    try:
        write_model(plain, manifest, fill)
        compress(plain, target)
    finally:
        plain.unlink(missing_ok=True)
    return None


def unpack(source: Path, target: Path, check: Check) -> None:
    """Write the model file in a zstd frame to `target`, which must not exist, checked on the way.

    Raises:
        ModelFormatError: it is no such frame, or the check refuses what is in it.
        OSError: the disk refused.
    """
    size = content_size(source)
    bytes_check = check(size)
    with target.open("xb") as file:
        for piece in decompress(source, size):
            bytes_check.feed(piece)
            file.write(piece)
    bytes_check.end()


@contextmanager
def opened(source: Path, beside: Path, check: Check, *, packed: bool) -> Iterator[Path]:
    """Yield a checked model file: `source` itself, or what is packed in it, in a passing file.

    Args:
        source: what came; from anybody.
        beside: a path whose folder takes the passing file.
        check: what it must be.
        packed: whether it is in a zstd frame.

    Raises:
        ModelFormatError: it is not what it must be.
        OSError: the disk refused.
    """
    if not packed:
        check_file(source, check(source.stat().st_size))
        yield source
        return
    plain = temporary_beside(beside)
    try:
        unpack(source, plain, check)
        yield plain
    finally:
        plain.unlink(missing_ok=True)
