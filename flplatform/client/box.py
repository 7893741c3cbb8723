"""The folders that a site shares with a job's code, which may put anything there.

    inbox/model.safetensors   the task's model; read-only for the run process
    box/result.safetensors    the trained model
    box/update.safetensors    what training returned, if that is not the whole model
    box/state/                `context.state_dir`

The site's parent follows no link in the box and takes *copies*: files that nobody else holds
open, mapped or linked, so that what it checks is what it sends. Whatever removes something that a
job's code has made does so by `remove`.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flplatform.client.frames import RESULT_FILE, STATE_FOLDER
from flplatform.core.errors import InvalidArgumentError, ResourceExhaustedError
from flplatform.files.durable import PRIVATE_DIR, PRIVATE_FILE, private_dir
from flplatform.files.removal import empty, remove

__all__ = ["MODEL_FILE", "Box", "copy_folder", "link", "remove"]

MODEL_FILE = "model.safetensors"
MAX_DEPTH = 64
MAX_FILES = 100_000
_STEP_BYTES = 1 << 30
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ODD = (errno.ELOOP, errno.ENOENT, errno.ENXIO, errno.EACCES, errno.ENOTDIR)
"""What opening something odd fails with: a link, nothing, a socket, no rights, no folder."""


class Box:
    """The exchange folders of one run process, below its run's folder."""

    def __init__(self, folder: Path) -> None:
        self.inbox = private_dir(folder / "inbox")
        self.box = private_dir(folder / "box")

    def prepare(self, model: Path | None, state: Path | None, max_state_bytes: int) -> None:
        """Empty the folders, then offer a task's model and a copy of the user's state.

        Raises:
            ResourceExhaustedError: the state is larger than `max_state_bytes`.
            OSError: a file cannot be read, or the disk is full.
        """
        self.clear()
        if model is not None:
            link(model, self.inbox / MODEL_FILE)
        private_dir(self.box / STATE_FOLDER)
        if state is not None:
            copy_folder(state, self.box / STATE_FOLDER, max_state_bytes)

    def collect_model(self, target: Path, max_bytes: int, name: str = RESULT_FILE) -> None:
        """Copy the model that a task made, or its update, to the file `target`.

        Raises:
            InvalidArgumentError: there is none, or something odd lies in its place.
            ResourceExhaustedError: it is larger than `max_bytes`.
            OSError: the disk is full.
        """
        with _opened(self.box) as box:
            _copy_file(box, name, target, _Budget(max_bytes, "the model"))

    def collect_state(self, target: Path, max_bytes: int) -> None:
        """Copy the user's state that a task left into the new folder `target`.

        Raises:
            InvalidArgumentError: something lies there that is neither file, folder nor link.
            ResourceExhaustedError: it is larger than `max_bytes`.
            OSError: the disk is full.
        """
        copy_folder(self.box / STATE_FOLDER, private_dir(target), max_bytes)

    def clear(self) -> int:
        """Empty both folders; return the bytes of the files that were in the box.

        Raises:
            OSError: something cannot be deleted.
        """
        empty(self.inbox)
        return empty(self.box)


def copy_folder(source: Path, target: Path, max_bytes: int) -> None:
    """Copy files, folders and links (as links) of `source` into the empty folder `target`.

    Raises:
        InvalidArgumentError: something else lies there, or folders nest too deeply.
        ResourceExhaustedError: more than `max_bytes`, or than `MAX_FILES`.
        OSError: the disk is full.
    """
    with _opened(source) as folder:
        _copy_entries(folder, target, _Budget(max_bytes, "the state"), MAX_DEPTH)


@contextmanager
def _opened(path: Path | str, parent: int | None = None) -> Iterator[int]:
    """Open a folder that is no link.

    Raises:
        InvalidArgumentError: it is not a folder that can be read.
    """
    with _explained(str(path)):
        handle = os.open(path, _READ | os.O_DIRECTORY, dir_fd=parent)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _ODD:
            raise
        raise InvalidArgumentError(f"cannot be read: {error.strerror}", field=name) from None


class _Budget:
    """Counts what is copied, against a limit in bytes and one in files."""

    def __init__(self, max_bytes: int, what: str) -> None:
        self._limit, self._what = max_bytes, what
        self._bytes, self._files = 0, 0

    def take(self, size: int) -> None:
        """Count one file of `size` bytes.

        Raises:
            ResourceExhaustedError: that is too much.
        """
        self._bytes += size
        self._files += 1
        if self._bytes > self._limit:
            raise ResourceExhaustedError(f"{self._what} is larger than {self._limit} bytes")
        if self._files > MAX_FILES:
            raise ResourceExhaustedError(f"{self._what} has more than {MAX_FILES} files")


def _copy_entries(folder: int, target: Path, budget: _Budget, depth: int) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            copy = target / entry.name
            if entry.is_symlink():
                budget.take(0)
                copy.symlink_to(os.readlink(entry.name, dir_fd=folder))
            elif not entry.is_dir(follow_symlinks=False):
                _copy_file(folder, entry.name, copy, budget)
            elif depth:
                budget.take(0)
                copy.mkdir(PRIVATE_DIR)
                with _opened(entry.name, folder) as inner:
                    _copy_entries(inner, copy, budget, depth - 1)
            else:
                raise InvalidArgumentError(f"folders are nested deeper than {MAX_DEPTH}")


def _copy_file(folder: int, name: str, target: Path, budget: _Budget) -> None:
    """Copy a regular file, as large as it is now, whatever happens to it meanwhile."""
    with _explained(name):
        source = os.open(name, _READ, dir_fd=folder)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgumentError("is not a regular file", field=name)
        budget.take(status.st_size)
        mode = PRIVATE_FILE | (status.st_mode & stat.S_IXUSR)
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _copy_bytes(source, copy, status.st_size)
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _copy_bytes(source: int, target: int, count: int) -> None:
    """Copy within the kernel; by sharing blocks where the file system can."""
    in_one_file_system = True
    while count:
        step = min(count, _STEP_BYTES)
        try:
            if in_one_file_system:
                copied = os.copy_file_range(source, target, step)
            else:
                copied = os.sendfile(target, source, None, step)
        except OSError as error:
            if not in_one_file_system or error.errno not in (errno.EXDEV, errno.EINVAL):
                raise
            in_one_file_system = False
            continue
        if not copied:
            return
        count -= copied


def link(source: Path, target: Path) -> None:
    """Show a file under another name; by a copy if the file system cannot."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
