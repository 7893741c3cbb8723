"""The files of an audit: the current one, and filled ones renamed to `<path>.000001` and so on."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from flplatform.core.errors import DataLossError
from flplatform.files.durable import PRIVATE_FILE, fsync_dir, sync, write_atomic

_BLOCK_BYTES = 256 << 10
_TAIL_BYTES = 2 << 20  # more than the longest record
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW


def rotated(path: Path) -> list[Path]:
    """Return the filled files, the oldest first."""
    return sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9][0-9]"))


def lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Yield file, number and text of all lines, but not of an unfinished one at the very end."""
    for file in [*rotated(path), path]:
        if file.exists():
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if file != path or line.endswith(b"\n"):
                        yield file, number, line


def lines_backwards(file: Path) -> Iterator[bytes]:
    """Yield whole lines from the end; one without an end is still being written."""
    with file.open("rb") as handle:
        end = handle.seek(0, os.SEEK_END)
        rest: bytes | None = None  # the end of a line that begins in the block before
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            handle.seek(start)
            block = handle.read(end - start)
            if rest is None:
                block, rest = block[: max(0, block.rfind(b"\n"))], b""
            first, *lines = (block + rest).split(b"\n")
            if len(first) > _TAIL_BYTES:
                raise DataLossError(f"{file}: holds a line of more than {_TAIL_BYTES} bytes")
            for line in reversed(lines):
                yield line + b"\n"
            end, rest = start, first
        if rest:
            yield rest + b"\n"


def tail(path: Path) -> bytes:
    """Return the end of a file, the whole last record in it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read()


def unfinished_bytes(path: Path) -> int:
    """Return the length of a record at the end that was not written out; 0 if there is none.

    Its writer has not acknowledged it: it is at work on it, or ended meanwhile.
    """
    end = tail(path) if path.exists() else b""
    return len(end) - end.rfind(b"\n") - 1


def open_append(path: Path) -> int:
    """Open the current file, made if missing, durably."""
    handle = os.open(path, _APPEND, PRIVATE_FILE)
    fsync_dir(path.parent)
    return handle


def exchange(path: Path) -> int:
    """Put an empty file in the place of a filled one, which is numbered; return its descriptor.

    Raises:
        OSError: the disk refused; everything is as it was, unless that was refused too.
    """
    number = max((int(file.suffix[1:]) for file in rotated(path)), default=0) + 1
    filled, fresh = (path.with_name(f"{path.name}.{end}") for end in (f"{number:06d}", "next"))
    with ExitStack() as always:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        always.callback(os.close, folder)
        undo = always.enter_context(ExitStack())
        handle = os.open(fresh, _APPEND | os.O_TRUNC, PRIVATE_FILE)
        undo.callback(os.close, handle)
        undo.callback(fresh.unlink, missing_ok=True)
        os.rename(path, filled)
        undo.callback(os.rename, filled, path)
        os.rename(fresh, path)
        undo.callback(os.rename, path, fresh)
        sync(folder)
        undo.pop_all()
    return handle


def is_open_as(path: Path, handle: int) -> bool:
    """Return whether this descriptor is of the file that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def move_torn_tail_aside(path: Path) -> Path | None:
    """Cut an unfinished last line (it was never acknowledged) off into a file of its own."""
    if not (size := unfinished_bytes(path)):
        return None
    torn = tail(path)[-size:]
    aside = path.with_name(f"{path.name}.torn-{time.time_ns()}")
    write_atomic(aside, torn)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - len(torn))
        os.fsync(file.fileno())
    return aside
