"""What a machine runs short of and gets back: space on the disk, descriptors, memory, processes."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.core.errors import ResourceExhaustedError
from flplatform.files.durable import PRIVATE_FILE, temporary_beside

_DISK = "disk", "the disk is full", "free some disk space at the receiver"
_FILES = "descriptors", "no file descriptor is left", "raise the limit of open files (ulimit -n)"
_MEMORY = "memory", "no memory is left", "end what takes it"
_PROCESSES = "processes", "no process can be started", "raise the limit of processes"
_SHORT = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
}
_OF_DATABASES = {
    "SQLITE_FULL": _DISK,
    "SQLITE_IOERR_SHMSIZE": _DISK,
    "SQLITE_NOMEM": _MEMORY,
    "SQLITE_IOERR_NOMEM": _MEMORY,
    "53100": _DISK,
}
"""The same in the words of SQLite, and as PostgreSQL's SQLSTATE."""
_RULES = {rule for rule, _, _ in _SHORT.values()}
PROBE_BYTES = 64 << 10


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


def shortage_in(error: BaseException) -> ResourceExhaustedError | None:
    """Return what this machine was short of, if that is why `error` came; else None.

    What led to an error counts as well. EAGAIN alone does not: a lock that is held says it too.
    """
    each: BaseException | None = error
    met: set[int] = set()
    while each is not None and id(each) not in met:
        met.add(id(each))
        if isinstance(each, ResourceExhaustedError) and each.rule in _RULES:
            return each
        if found := _shortage(each):
            rule, text, hint = found
            return ResourceExhaustedError(text, rule=rule, hint=hint)
        each = each.__cause__ or each.__context__
    return None


def remedy_at(shortage: ResourceExhaustedError, host: str) -> str:
    """Return what to do about a shortage, for somebody who may be elsewhere.

    Args:
        shortage: what a machine is short of.
        host: names that machine.
    """
    if shortage.rule == _DISK[0]:
        return f"free space on the disk of {host}, then try again"
    return f"at {host}: {shortage.hint}"


def _shortage(error: BaseException) -> tuple[str, str, str] | None:
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError):
        return None if error.errno in (None, errno.EAGAIN) else _SHORT.get(error.errno)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return _PROCESSES
    name = getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None)
    return _OF_DATABASES.get(name or "")


def probe(folder: Path) -> OSError | None:
    """Return why a small file cannot be written to a folder now, if for a shortage; else None.

    For libraries that tell a full disk as any other error.
    """
    path = temporary_beside(folder / "probe")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
        try:
            written = os.write(handle, bytes(PROBE_BYTES))
            os.write(handle, bytes(PROBE_BYTES - written))  # tells why the rest found no room
            os.fsync(handle)
        finally:
            os.close(handle)
            path.unlink(missing_ok=True)
    except OSError as error:
        return error if error.errno in _SHORT else None
    return None


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
