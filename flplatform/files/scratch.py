"""Temporary folders; what a killed process leaves is removed by the next one that makes such."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.files.lock import is_same

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DRAWN = 8
"""Characters that `mkdtemp` puts behind a prefix."""


@contextmanager
def scratch_folder(prefix: str, beside: Path | None = None) -> Iterator[Path]:
    """Make a folder for this user alone, gone after the block; its process holds a lock on it.

    Args:
        prefix: of its name; folders with it whose process is dead are removed.
        beside: where it lies; None for the system's place for temporary files.

    Raises:
        OSError: it cannot be made.
    """
    place = beside or Path(tempfile.gettempdir())
    for leftover in place.glob(prefix + "?" * DRAWN):
        _clear(leftover)
    folder, lock = _make(place, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(place: Path, prefix: str) -> tuple[Path, int]:
    while True:  # another process may clear the folder away before it is locked
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = _lock(folder)
        except (FileNotFoundError, BlockingIOError):
            continue
        except OSError:  # a file system without locks: nobody clears anything away on it
            return folder, os.open(folder, FLAGS)
        if is_same(lock, folder):
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int:
    """Return the open folder, locked.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is gone, or no folder.
    """
    handle = os.open(folder, FLAGS)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _clear(leftover: Path) -> None:
    """Remove a folder of this user's that no process holds."""
    with contextlib.suppress(OSError):
        lock = _lock(leftover)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(lock)
