"""A backup that comes to be beside its place, and what backups that were killed have left there."""

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flplatform.files.durable import fsync_dir, private_dir, temporary_beside

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}-.")


@contextmanager
def becoming(target: Path) -> Iterator[Path]:
    """Make a folder that gets its name when the block ends well, and goes if it does not.

    Yields:
        The folder, locked while it is worked on.

    Raises:
        OSError: the disk refused; nothing is left behind.
    """
    folder = private_dir(temporary_beside(target))
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        folder.rmdir()
        raise
    try:
        with suppress(OSError):  # without locks nobody takes it for one that was left, either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
        os.rename(folder, target)
        fsync_dir(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def remove_left(parent: Path, whole: str, names: Collection[str]) -> Iterator[Path]:
    """Remove such folders that nobody works on; yield them.

    Args:
        parent: where they lie.
        whole: what is in each from the beginning.
        names: what else may be in them: a folder with anything else is none.
    """
    for path in sorted(parent.glob(".tmp-*")):
        with suppress(OSError):
            if not _TEMPORARY.match(path.name):
                continue
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = {name for name in os.listdir(path) if not name.startswith(".tmp-")}
                if whole in found and found <= {whole, *names}:
                    shutil.rmtree(path)
                    yield path
            finally:
                os.close(handle)
