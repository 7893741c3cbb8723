"""Temporary folders; what a killed process leaves is removed by the next one that makes such."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flplatform.files.lock import is_same
from flplatform.files.removal import enter, remove

DRAWN = 8
"""Characters that `mkdtemp` puts behind a prefix."""


class Scratch(NamedTuple):
    """A folder for this user alone, and the lock on it that its process holds."""

    folder: Path
    lock: int

    def close(self) -> None:
        """Delete the folder.

        Raises:
            OSError: something in it cannot be deleted; it is left to `sweep`.
        """
        try:
            remove(self.folder)
        finally:
            os.close(self.lock)


def open_scratch(place: Path, prefix: str) -> Scratch:
    """Make a folder with a drawn name, which no `sweep` removes as long as this process lives.

    Raises:
        OSError: it cannot be made.
    """
    while True:  # another process may clear the folder away before it is locked
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = _lock(folder)
        except (FileNotFoundError, BlockingIOError):
            continue
        except OSError:  # a file system without locks: nobody clears anything away on it
            return Scratch(folder, _reopened(folder))
        if is_same(lock, folder):
            return Scratch(folder, lock)
        os.close(lock)


def sweep(place: Path, pattern: str) -> None:
    """Remove this user's folders whose process is dead; blocks.

    Args:
        place: where they lie.
        pattern: of their names, as for `Path.glob`.
    """
    for leftover in place.glob(pattern):
        _clear(leftover)


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
    sweep(place, prefix + "?" * DRAWN)
    scratch = open_scratch(place, prefix)
    try:
        yield scratch.folder
    finally:
        with contextlib.suppress(OSError):
            scratch.close()


def _lock(folder: Path) -> int:
    """Return the open folder, locked.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it is gone, or no folder.
    """
    handle = enter(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _reopened(folder: Path) -> int:
    try:
        return enter(folder)
    except OSError:  # no descriptor is left
        folder.rmdir()
        raise


def _clear(leftover: Path) -> None:
    """Remove a folder of this user's that no process holds."""
    with contextlib.suppress(OSError):
        lock = _lock(leftover)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                remove(leftover)
        finally:
            os.close(lock)
