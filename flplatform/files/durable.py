"""Files that are either whole or absent, whatever happens to the machine.

A name becomes visible only by `rename`, after the bytes and before the directory entry are
fsynced. Nothing here retries a failed fsync: after one, the state of the page cache is unknown. A
process that serves ends then (`end_on_failed_sync`), and starts again from what the disk has.
"""

import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from flplatform.core.errors import ConfigError

log = logging.getLogger(__name__)

PRIVATE_FILE = 0o600
READ_ONLY_FILE = 0o444
PRIVATE_DIR = 0o700
FAILED_SYNC_EXIT = 70
"""Exit code after a failed write or fsync: what is on the disk is unknown, the log decides."""

_ends_process = False


def end_on_failed_sync() -> None:
    """From now on a failed `sync` ends this process with `FAILED_SYNC_EXIT`."""
    global _ends_process  # noqa: PLW0603 - one process, one disk that cannot be relied on
    _ends_process = True


def sync(handle: int, data_only: bool = False) -> None:
    """Make an open file durable.

    Args:
        handle: its descriptor.
        data_only: leave out what reading the bytes again does not need.

    Raises:
        OSError: the disk refused. What it holds now is unknown, unless it is full.
    """
    try:
        os.fdatasync(handle) if data_only else os.fsync(handle)
    except OSError as error:
        if _ends_process and error.errno == errno.EIO:
            name = os.readlink(f"/proc/self/fd/{handle}")
            log.critical("%s cannot be made durable, the process ends: %s", name, error)
            logging.shutdown()
            os._exit(FAILED_SYNC_EXIT)
        raise


def fsync_dir(path: Path) -> None:
    """Make the directory's entries durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def replace_durably(source: Path, target: Path) -> None:
    """Give a durable file its name, and make that durable.

    The folder is opened first: for want of a descriptor there is no name that nobody has synced.
    """
    handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.replace(source, target)
        sync(handle)
    finally:
        os.close(handle)


def temporary_beside(path: Path) -> Path:
    """Return an unused name in the same directory, recognisable as temporary (`.tmp-`)."""
    return path.parent / f".tmp-{secrets.token_hex(8)}-{path.name[:100]}"


def write_atomic(path: Path, data: bytes | Iterable[bytes], mode: int = PRIVATE_FILE) -> None:
    """Write `data` so that `path` holds either its old content or all of the new.

    Args:
        path: the file's final name; its directory exists.
        data: the bytes, or chunks of them.
        mode: permission bits, set at creation and never loosened afterwards.

    Raises:
        OSError: the disk refused; nothing is left behind.
    """
    temporary = temporary_beside(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            for chunk in (data,) if isinstance(data, bytes) else data:
                file.write(chunk)
            file.flush()
            sync(file.fileno())
        replace_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def private_dir(path: Path) -> Path:
    """Create `path` (and parents) for this user alone, durable on return, and return it.

    Raises:
        ConfigError: a file or a link to nowhere is in its place.
    """
    if not path.is_dir():
        private_dir(path.parent)
        try:
            path.mkdir(mode=PRIVATE_DIR, exist_ok=True)
        except FileExistsError:
            is_link = path.is_symlink()
            hint = "put the folder there, or remove the link" if is_link else "move it away"
            raise ConfigError(why_no_folder(path), hint=hint) from None
        fsync_dir(path.parent)
    return path


def why_no_folder(path: Path) -> str:
    """Return what is in the place of a folder; empty if it is one, or nothing is there."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    return f"{path} is no folder" if path.exists() and not path.is_dir() else ""


def check_private(path: Path) -> None:
    """Refuse a secret file that anybody else may read.

    Raises:
        ConfigError: group or others have rights on `path`, or another user owns it.
    """
    status = path.stat()
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: others may read it",
            hint=f"run: chmod 600 {path}",
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path} belongs to user id {status.st_uid}", hint="run as its owner")


def remove_temporaries(directory: Path) -> None:
    """Delete what an interrupted writer left in `directory`."""
    for leftover in directory.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
