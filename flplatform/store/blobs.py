"""Blobs in files: `<root>/<64 hex digits>`, read-only once they have that name.

What is being received lies in `<root>/incoming`, in a file named by transfer and digest: whatever
is in there after a crash is the part of that blob to go on from, once it has been checked again.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from weakref import WeakValueDictionary

from flplatform.core.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, PartOf, check_digest, is_digest
from flplatform.files.digest import demand_digest, digest_of_file
from flplatform.files.durable import (
    READ_ONLY_FILE,
    fsync_dir,
    private_dir,
    remove_temporaries,
    replace_durably,
    sync,
    temporary_beside,
)
from flplatform.files.modelfile import check_file, model_check
from flplatform.files.shortage import explaining_shortage
from flplatform.store.part_file import PartFile

log = logging.getLogger(__name__)

KEEP_PARTS_S = 86_400.0
"""How long the part of an interrupted transfer is kept without going on."""

SWEEP_S = 3600.0
"""Older parts are looked for at the start, and so often while blobs are received."""


class FileBlobStore:
    """`ports.BlobStore` in a folder of its own. Thread-safe; the writers it returns are not.

    Args:
        root: the folder, made if missing; one process at a time works on it.
        reserve_bytes: free space that receiving must leave on the disk, for everything else.
        copies: whether every blob can be had again from elsewhere. Then `has_whole` drops one that
            the disk cannot read; else it may be the only one, and the disk may read it later.
    """

    def __init__(self, root: Path, reserve_bytes: int = 0, *, copies: bool = False) -> None:
        self._copies = copies
        self._root = private_dir(root)
        self._incoming = private_dir(root / "incoming")
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._active: dict[str, PartFile] = {}
        self._forgotten: set[str] = set()
        self._checked: set[str] = set()
        self._locks: WeakValueDictionary[str, threading.RLock] = WeakValueDictionary()
        self._collected = time.monotonic()
        remove_temporaries(root)
        self.collect()

    def collect(self, unused_s: float = KEEP_PARTS_S) -> None:
        """Delete the parts of transfers that have not gone on for `unused_s` seconds."""
        self._collected = time.monotonic()
        self.drop_parts((), unused_s)

    def drop_parts(self, keep: Collection[str], unused_s: float) -> int:
        """Delete what transfers have left that are not at work; what cannot be deleted stays.

        Args:
            keep: digests of blobs whose parts stay.
            unused_s: so do those that have grown in so many seconds.

        Returns:
            The bytes of the deleted.
        """
        kept = {digest.partition(":")[2] for digest in keep}
        freed = 0
        with self._lock:
            active = {writer.part for writer in self._active.values()}
            for part in self._incoming.iterdir():
                if part in active or kept.intersection(part.name.split(".")):
                    continue
                try:
                    status = part.stat()
                    if status.st_mtime <= time.time() - unused_s:
                        part.unlink()
                        freed += status.st_size
                except OSError as error:
                    log.warning("the part of a transfer stays for now: %s", error)
        return freed

    def forget(self, transfer_id: str) -> None:
        """Delete what a transfer has left, or leaves if it breaks off; see `ports.BlobStore`."""
        with self._lock:
            if transfer_id in self._active:
                self._forgotten.add(transfer_id)
                return
            for part in self._incoming.glob(f"{_prefix(transfer_id)}.*.part"):
                part.unlink()

    def has(self, digest: str) -> bool:
        """Return whether the blob is here.

        Raises:
            ModelFormatError: `digest` is not one.
        """
        return self._file(digest).exists()

    def has_whole(self, digest: str) -> bool:
        """Return whether the blob is here and `checked`; a damaged one makes room for another.

        Raises:
            UnavailableError: it cannot be read now, or what is no good not be deleted.
            ResourceExhaustedError: no descriptor is left.
            ModelFormatError: `digest` is not one.
        """
        with self._reading(digest):
            try:
                self.checked(digest)
            except NotFoundError:
                return False
            except (DataLossError, UnavailableError) as error:
                if isinstance(error, UnavailableError) and not self._copies:
                    raise
                log.error("it is dropped and wanted again: %s", error)
                try:
                    self.delete(digest)
                except OSError as refused:
                    raise UnavailableError(f"{error}; nor can it be deleted: {refused}") from error
                return False
        return True

    def path(self, digest: str) -> Path:
        """Return the file of a blob.

        Raises:
            NotFoundError: no such blob.
            ModelFormatError: `digest` is not one.
        """
        path = self._file(digest)
        if not path.exists():
            raise NotFoundError(f"there is no blob {digest}")
        return path

    def checked(self, digest: str) -> Path:
        """Return the file of a blob whose bytes this process has written or read through.

        Raises:
            NotFoundError: no such blob.
            DataLossError: its bytes are not what they were.
            UnavailableError: it cannot be read now.
            ResourceExhaustedError: no descriptor is left.
            ModelFormatError: `digest` is not one.
        """
        path = self.path(digest)
        if digest not in self._checked:
            with self._reading(digest):  # whoever else needs it waits instead of reading it, too
                if digest not in self._checked:
                    self._read_through(path, digest)
        return path

    def _read_through(self, path: Path, digest: str) -> None:
        try:
            with explaining_shortage():
                demand_digest(path, digest)
        except FileNotFoundError:
            raise NotFoundError(f"there is no blob {digest}") from None
        except OSError as error:
            raise UnavailableError(f"{path} cannot be read: {error}") from error
        self._checked.add(digest)

    def _reading(self, digest: str) -> "threading.RLock":
        with self._lock:
            return self._locks.setdefault(digest, threading.RLock())

    def receive(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None = None
    ) -> PartFile:
        """Start or resume receiving a blob; see `ports.BlobStore`.

        Of a blob that is here and whole no byte is wanted again, but `manifest` is held against it.

        Raises:
            InvalidArgumentError: the size cannot be that of this blob.
            ModelFormatError: the size is not that of `manifest`, or the blob that is here does
                not fit it.
            ResourceExhaustedError: the blob would not leave the reserve free.
            UnavailableError: the same transfer is being received right now.
        """
        with explaining_shortage():
            return self._receive(transfer_id, blob, manifest)

    def _receive(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None
    ) -> PartFile:
        check_digest(blob.digest)
        if blob.size < 0:
            raise InvalidArgumentError(f"{blob.size} is not a size in bytes", field="blob.size")
        if manifest is not None:
            model_check(manifest, blob.size)
        if self.has_whole(blob.digest):
            return self._received_before(transfer_id, blob, manifest)
        prefix = _prefix(transfer_id)
        part = self._incoming / f"{prefix}.{self._file(blob.digest).name}.part"
        writer = self._part(transfer_id, blob, manifest, part)
        if time.monotonic() > self._collected + SWEEP_S:
            self.collect()
        with self._lock:
            if transfer_id in self._active:
                raise UnavailableError(
                    f"transfer {transfer_id!r} is being received right now",
                    hint="try again when the other connection has ended",
                )
            for other in self._incoming.glob(f"{prefix}.*.part"):
                if other != part:
                    other.unlink()
            self._check_space(blob, part)
            self._active[transfer_id] = writer
        try:
            writer.open()
        except BaseException:
            writer.suspend()
            raise
        return writer

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Make a blob from a file that `fill` writes at the path it is given.

        The reserve is there for such writes: it is not held against them.

        Raises:
            ResourceExhaustedError: the disk is full; nothing is left behind.
        """
        temporary = temporary_beside(self._root / "blob")
        try:
            with explaining_shortage():
                fill(temporary)
                digest, size = digest_of_file(temporary)
                with temporary.open("rb") as file:
                    os.fchmod(file.fileno(), READ_ONLY_FILE)
                    sync(file.fileno())
                self._publish(temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)
        return ModelRef(digest, size)

    def delete(self, digest: str) -> None:
        """Remove a blob, if it is here; mappings of it stay valid."""
        self._checked.discard(digest)
        self._file(digest).unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """Return the digests of all blobs, sorted."""
        return digests_in(self._root)

    def free_bytes(self) -> int:
        """Return how many bytes can be received now; negative if the reserve is in use."""
        with self._lock:
            return self._free_bytes()

    def _file(self, digest: str) -> Path:
        return self._root / check_digest(digest).partition(":")[2]

    def _received_before(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None
    ) -> PartFile:
        path = self.path(blob.digest)
        fsync_dir(self._root)  # the sync after its rename may have failed
        os.utime(path)  # it is as new as this upload, to whoever collects what is old and unused
        size = path.stat().st_size
        if size != blob.size:
            raise InvalidArgumentError(
                f"is {blob.size}, but {blob.digest} has {size} bytes", field="blob.size"
            )
        if manifest is not None:
            check_file(path, model_check(manifest, size))
        return self._part(transfer_id, blob, manifest, None)

    def _part(
        self,
        transfer_id: str,
        blob: ModelRef,
        manifest: Manifest | PartOf | None,
        part: Path | None,
    ) -> PartFile:
        return PartFile(transfer_id, blob, manifest, part, self._publish, self._release)

    def _free_bytes(self) -> int:
        promised = sum(writer.promised_bytes for writer in self._active.values())
        return shutil.disk_usage(self._root).free - promised - self._reserve_bytes

    def _check_space(self, blob: ModelRef, part: Path) -> None:
        missing = blob.size - (part.stat().st_size if part.exists() else 0)
        free = self._free_bytes()
        if missing > free:
            raise ResourceExhaustedError(
                f"{missing} bytes are to come, {max(free, 0)} are free beyond the reserve",
                rule="reserve_bytes",
                hint="free some disk space at the receiver",
            )

    def _publish(self, temporary: Path, digest: str) -> None:
        """Give a whole and durable file its final name; it is the same if it has been there."""
        with self._reading(digest):  # whoever finds it there need not read it
            replace_durably(temporary, self._file(digest))
            self._checked.add(digest)

    def _release(self, writer: PartFile) -> None:
        with self._lock:
            if self._active.get(writer.transfer_id) is not writer:
                return
            del self._active[writer.transfer_id]
            if writer.transfer_id in self._forgotten and writer.part is not None:
                self._forgotten.discard(writer.transfer_id)
                with suppress(OSError):  # it goes when it is old
                    writer.part.unlink(missing_ok=True)


def digests_in(root: Path) -> list[str]:
    """Return the digests of the blobs in a folder, sorted; other files there are not looked at."""
    found = (f"blake3:{path.name}" for path in root.iterdir() if path.is_file())
    return sorted(digest for digest in found if is_digest(digest))


def _prefix(transfer_id: str) -> str:
    return sha256(transfer_id.encode()).hexdigest()
