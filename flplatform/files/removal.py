"""Deletes folders that somebody else has filled, whatever he has put into them.

No link is followed. Depth does not matter, neither to the stack nor to the length of a path nor to
the number of descriptors: only one folder at a time is open, and the way back is `..`. Rights that
the owner has taken from himself are given back.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flplatform.files.durable import PRIVATE_DIR

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNREAD = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there.

    Raises:
        OSError: something in it cannot be deleted; all else in it is gone.
    """
    try:
        is_folder = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_folder:
        empty(path)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def empty(folder: Path) -> int:
    """Delete all that is in a folder; return the bytes of the regular files among it.

    Raises:
        OSError: something cannot be deleted; all else is gone.
    """
    walk = _Walk(enter(folder))
    try:
        while walk.step():
            pass
    finally:
        os.close(walk.here)
    if walk.error is not None:
        raise walk.error
    return walk.size


@dataclass
class _Level:
    """A folder on the way down: its name in the one above, and the folders to go into yet."""

    name: str
    identity: tuple[int, int]
    folders: list[str] = field(default_factory=list)


class _Walk:
    """Empties the open folder `here`.

    Attributes:
        here: the one folder that is open.
        size: bytes of the regular files deleted.
        error: the first one.
    """

    def __init__(self, here: int) -> None:
        self.here = here
        self.size = 0
        self.error: OSError | None = None
        self._levels: list[_Level] = []
        self._look("")

    def step(self) -> bool:
        """Go one folder down, or back up and delete the one that was left; False at the end."""
        level = self._levels[-1]
        if level.folders:
            name = level.folders.pop()
            with self._noted():
                self._go(enter(name, self.here))
                self._look(name)
            return True
        if len(self._levels) == 1:
            return False
        self._levels.pop()
        self._go(os.open("..", _UNREAD, dir_fd=self.here))
        if _identity(self.here) != self._levels[-1].identity:
            raise OSError(f"{level.name} was moved while it was deleted")
        with self._noted():
            os.rmdir(level.name, dir_fd=self.here)
        return True

    def _look(self, name: str) -> None:
        """Delete the files of the folder that is open now, and note its folders."""
        level = _Level(name, _identity(self.here))
        self._levels.append(level)
        with self._noted(), os.scandir(self.here) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    level.folders.append(entry.name)
                    continue
                with self._noted():
                    status = entry.stat(follow_symlinks=False)
                    os.unlink(entry.name, dir_fd=self.here)
                    self.size += status.st_size if stat.S_ISREG(status.st_mode) else 0

    def _go(self, folder: int) -> None:
        os.close(self.here)
        self.here = folder

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass  # somebody else has deleted it
        except OSError as error:
            self.error = self.error or error


def _identity(folder: int) -> tuple[int, int]:
    status = os.fstat(folder)
    return status.st_dev, status.st_ino


def enter(name: str | Path, parent: int | None = None) -> int:
    """Open a folder that is no link, with all rights on it for its owner; return the handle.

    Args:
        name: its path, or its name in `parent`.
        parent: handle of an open folder.

    Raises:
        OSError: it cannot be opened, or is no folder.
    """
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        unread = os.open(name, _UNREAD, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{unread}", PRIVATE_DIR)
        finally:
            os.close(unread)
        folder = os.open(name, _FOLDER, dir_fd=parent)
    if os.fstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        with contextlib.suppress(PermissionError):  # it is another's, who may have let this user in
            os.fchmod(folder, PRIVATE_DIR)
    return folder
