"""The files of a state taken into a backup: by link where the disk can, else copied."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flplatform.files.durable import PRIVATE_FILE, READ_ONLY_FILE
from flplatform.server.upkeep.place import BlobFolder

TOLD_EVERY_S = 5.0
"""How often is told how far the taking has got."""

_UNREADABLE = frozenset(
    {errno.EACCES, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.EPERM}
)
"""What a file that is to be taken gives, and not the disk that it is taken to."""


def copy_file(source: Path, target: Path, mode: int = PRIVATE_FILE) -> None:
    """Copy a file, durable on return.

    Args:
        source: an existing file.
        target: must not exist.
        mode: permission bits of the copy.

    Raises:
        OSError: it cannot be read or written; nothing is left behind.
    """
    with source.open("rb") as reader:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.open(target, flags, mode)
        try:
            with os.fdopen(handle, "wb") as writer:
                shutil.copyfileobj(reader, writer, 4 << 20)
                writer.flush()
                os.fsync(writer.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def why_unreadable(error: OSError) -> str:
    """Return why a file cannot be read.

    Raises:
        OSError: `error`, if it is the disk that refuses.
    """
    if error.errno not in _UNREADABLE:
        raise error
    return f"cannot be read: {error.strerror}"


class TakenBlobs:
    """Blobs of a state that a server may be at work on, taken into a folder.

    Args:
        source: the state's.
        folder: where they go; empty, on the disk of the backup.
        link: take them by hard link where the file system can: they are never written again.
        progress: told from time to time how far it has got.

    Attributes:
        here: digests of what was taken.
        unreadable: digest → why it could not be.
        links: whether they are linked.
    """

    def __init__(
        self, source: BlobFolder, folder: Path, link: bool, progress: Callable[[str], None]
    ) -> None:
        self.here: set[str] = set()
        self.unreadable: dict[str, str] = {}
        self._source = source
        self._folder = folder
        self._progress = progress
        self.links = link and self._can_link()

    def file(self, digest: str) -> Path:
        """Return where a blob that was taken lies."""
        return self._folder / self._source.file(digest).name

    def take(self, digests: Iterable[str]) -> None:
        """Take those that are there and were not taken yet.

        Raises:
            OSError: the disk refused.
        """
        wanted = sorted(set(digests) - self.here)
        told = time.monotonic()
        for count, digest in enumerate(wanted):
            if time.monotonic() > told + TOLD_EVERY_S:
                told = time.monotonic()
                self._progress(f"{count} of {len(wanted)} blobs")
            self.unreadable.pop(digest, None)
            try:
                if self._take(digest):
                    self.here.add(digest)
            except FileNotFoundError:
                continue
            except OSError as error:
                self.unreadable[digest] = why_unreadable(error)

    def drop(self, digest: str) -> None:
        """Take one out again."""
        self.here.discard(digest)
        self.file(digest).unlink()

    def drop_all_but(self, needed: Collection[str]) -> set[str]:
        """Take out what is not needed; return that."""
        dropped = self.here - set(needed)
        for digest in dropped:
            self.drop(digest)
        return dropped

    def _take(self, digest: str) -> bool:
        source, target = self._source.file(digest), self.file(digest)
        if not stat.S_ISREG(source.lstat().st_mode):
            self.unreadable[digest] = "is no plain file"
            return False
        if not (self.links and _link(source, target)):
            copy_file(source, target, READ_ONLY_FILE)
        return True

    def _can_link(self) -> bool:
        for digest in self._source.digests():
            source = self._source.file(digest)
            try:
                if source.is_symlink():
                    continue
                linked = _link(source, self.file(digest))
            except FileNotFoundError:  # freed just now
                continue
            if linked:
                self.here.add(digest)
            return linked
        return True


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        return False
    return True
