"""Locks of the operating system: they end with whoever holds them, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.core.errors import FailedPreconditionError
from flplatform.files.durable import PRIVATE_FILE

PROCESS_LOCK = "process.lock"
"""In a kit's folder: held by its server or site for as long as it runs."""


@contextmanager
def held(path: Path, what: str) -> Iterator[int]:
    """Hold the lock that `path` stands for, and write this process's number into it.

    Args:
        path: made if missing, never removed: the lock is on the file, not on its name.
        what: what one process at a time may do.

    Yields:
        The open file.

    Raises:
        FailedPreconditionError: another process holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip() or "?"
            raise FailedPreconditionError(
                f"{what} is in use by process {owner}", hint="stop it first", rule="one_process"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield handle
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Return whether some process holds the lock that `path` stands for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def is_same(handle: int, path: Path) -> bool:
    """Return whether `path` still names the open file `handle`."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False
