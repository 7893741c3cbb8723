"""What a machine runs short of and gets back: space on the disk, descriptors, memory, processes."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.core.errors import ResourceExhaustedError

_DISK = "disk", "the disk is full", "free some disk space at the receiver"
_FILES = "descriptors", "no file descriptor is left", "raise the limit of open files (ulimit -n)"
_SHORT = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: ("memory", "no memory is left", "end what takes it"),
    errno.EAGAIN: ("processes", "no process can be started", "raise the limit of processes"),
}


@contextmanager
def explaining_shortage() -> Iterator[None]:
    """Turn the errors of a machine that is short of something into one that says so.

    Raises:
        ResourceExhaustedError: it is; `rule` names of what. The same may work later.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _SHORT:
            raise
        rule, text, hint = _SHORT[error.errno]
        raise ResourceExhaustedError(text, rule=rule, hint=hint) from error


def demand_room(folder: Path, count: int) -> None:
    """Refuse to begin what cannot end for want of space.

    Raises:
        ResourceExhaustedError: fewer than `count` bytes are free on the folder's disk.
    """
    free = shutil.disk_usage(folder).free
    if free < count:
        rule, _, hint = _DISK
        raise ResourceExhaustedError(
            f"{count} bytes are needed on the disk, {free} are free", rule=rule, hint=hint
        )
