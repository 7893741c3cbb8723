"""A tree of the few folders that may be looked into from afar, and nothing beside them.

A path of the tree is opened component by component from a handle on a trusted folder, and no
component may be a link: whatever is swapped, renamed or linked meanwhile, what is opened lies below
that folder. Only regular files with one name and folders are opened.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flplatform.core.errors import NotFoundError, PermissionDeniedError
from flplatform.files.names import check_path

RULE = "files of the tree only"
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ODD = {
    errno.ELOOP: "is a symbolic link",
    errno.ENXIO: "is neither a file nor a folder",
    errno.ENODEV: "is neither a file nor a folder",
    errno.EACCES: "may not be read",
    errno.EPERM: "may not be read",
}
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_SECRET = (".key", ".pem", ".p12", ".pfx", ".crt")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a part of the tree lies.

    Attributes:
        base: a folder that only the host's owner can change.
        parts: the way from there; others may write along it.
    """

    base: Path
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a folder shows of one thing in it; `status` is None where only the tree knows it."""

    name: str
    status: os.stat_result | None

    @property
    def is_folder(self) -> bool:
        """Whether it can be listed."""
        return self.status is None or stat.S_ISDIR(self.status.st_mode)


class Tree:
    """Opens paths of a tree.

    Args:
        mounts: path in the tree → where it lies; no one is the beginning of another.
    """

    def __init__(self, mounts: Mapping[str, Mount]) -> None:
        self._mounts = {tuple(path.split("/")): mount for path, mount in mounts.items()}

    @contextmanager
    def file(self, path: str) -> Iterator[int]:
        """Open a regular file for reading; the handle is closed afterwards.

        Raises:
            InvalidArgumentError: the path is absolute, has `..` or is otherwise no name.
            NotFoundError: there is no such file.
            PermissionDeniedError: it is a link, a device or the like, or has a second name.
        """
        parts = check_path(path, "PATH")
        if self._children(parts):
            raise NotFoundError(f"{path} is a folder", hint="ls shows what is in it")
        with self._opened(parts) as handle:
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                raise NotFoundError(f"{path} is a folder", hint="ls shows what is in it")
            if status.st_nlink > 1:
                raise _refused(path, "has a second name somewhere")
            if parts[-1].lower().endswith(_SECRET):
                raise _refused(path, "has the name of a key")
            yield handle

    def entries(self, path: str) -> Iterator[Entry]:
        """Yield what is in a folder, in no order; a file yields itself.

        Raises:
            InvalidArgumentError, NotFoundError, PermissionDeniedError: as `file`.
        """
        parts = check_path(path, "PATH") if path else ()
        if children := self._children(parts):
            for name in children:
                yield Entry(name, self._status((*parts, name)))
            return
        if not parts:
            return
        with self._opened(parts) as handle:
            status = os.fstat(handle)
            if not stat.S_ISDIR(status.st_mode):
                yield Entry(parts[-1], status)
                return
            with os.scandir(handle) as found:
                for entry in found:
                    try:
                        yield Entry(entry.name, entry.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        continue  # gone since

    def _children(self, parts: tuple[str, ...]) -> list[str]:
        """Return what the tree itself knows below a path that is no mount."""
        length = len(parts)
        below = (mount for mount in self._mounts if len(mount) > length)
        return sorted({mount[length] for mount in below if mount[:length] == parts})

    def _status(self, parts: tuple[str, ...]) -> os.stat_result | None:
        if parts not in self._mounts:
            return None
        try:
            with self._opened(parts) as handle:
                return os.fstat(handle)
        except (NotFoundError, PermissionDeniedError):
            return None

    @contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[int]:
        path = "/".join(parts)
        key = next((parts[:n] for n in range(1, len(parts) + 1) if parts[:n] in self._mounts), None)
        if key is None:
            raise _missing(path)
        mount = self._mounts[key]
        handle = os.open(mount.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(handle).st_dev
            for part in (*mount.parts, *parts[len(key) :]):
                inner = _open_in(handle, part, path)
                os.close(handle)
                handle = inner
                status = os.fstat(handle)
                if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                    raise _refused(path, "is neither a file nor a folder")
                if status.st_dev != device:
                    raise _refused(path, "lies on another file system")
            yield handle
        finally:
            os.close(handle)


def _open_in(folder: int, name: str, path: str) -> int:
    try:
        return os.open(name, _FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in _ODD:
            raise _refused(path, _ODD[error.errno]) from None
        if error.errno in _ABSENT:
            raise _missing(path) from None
        raise


def _refused(path: str, why: str) -> PermissionDeniedError:
    return PermissionDeniedError(f"{path} {why}", rule=RULE)


def _missing(path: str) -> NotFoundError:
    return NotFoundError(f"there is no {path}", hint="ls shows what there is")
