"""Files that are either whole or absent, whatever happens to the machine.

A name becomes visible only by `rename`, after the bytes and before the directory entry are
fsynced. Nothing here retries a failed fsync: after one, the state of the page cache is unknown.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from flplatform.core.errors import ConfigError

PRIVATE_FILE = 0o600
PRIVATE_DIR = 0o700


def fsync_dir(path: Path) -> None:
    """Make the directory's entries durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
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
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def private_dir(path: Path) -> Path:
    """Create `path` (and parents) for this user alone, and return it."""
    path.mkdir(mode=PRIVATE_DIR, parents=True, exist_ok=True)
    return path


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
