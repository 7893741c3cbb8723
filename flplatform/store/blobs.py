"""Blobs in files: `<root>/<64 hex digits>`, read-only once they have that name.

What is being received lies in `<root>/incoming`, in a file named by transfer and digest: whatever
is in there after a crash is the part of that blob to go on from, once it has been checked again.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from weakref import WeakValueDictionary

from flplatform.core.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, PartOf, check_digest
from flplatform.files.digest import STEP_BYTES, Digest, demand_digest, digest_of_file
from flplatform.files.durable import (
    PRIVATE_FILE,
    fsync_dir,
    private_dir,
    remove_temporaries,
    replace_durably,
    sync,
    temporary_beside,
)
from flplatform.files.modelfile import check_file, model_check
from flplatform.files.shortage import explaining_shortage
from flplatform.files.writing import set_aside, start_writing

log = logging.getLogger(__name__)

READ_ONLY = 0o444
KEEP_PARTS_S = 86_400.0
"""How long the part of an interrupted transfer is kept without going on."""

SWEEP_S = 3600.0
"""Older parts are looked for at the start, and so often while blobs are received."""

AHEAD_BYTES = 64 << 20
"""Disk space set aside ahead of what has come: no more than that is lent to a mere declaration."""

SYNC_STEP_BYTES = 8 << 20
"""So much of a file is sent on its way to the disk at a time."""


class FileBlobStore:
    """`ports.BlobStore` in a folder of its own. Thread-safe; the writers it returns are not.

    Args:
        root: the folder, made if missing; one process at a time works on it.
        reserve_bytes: free space that receiving must leave on the disk, for everything else.
    """

    def __init__(self, root: Path, reserve_bytes: int = 0) -> None:
        self._root = private_dir(root)
        self._incoming = private_dir(root / "incoming")
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._active: dict[str, _FileWriter] = {}
        self._checked: set[str] = set()
        self._locks: WeakValueDictionary[str, threading.RLock] = WeakValueDictionary()
        self._collected = time.monotonic()
        remove_temporaries(root)
        self.collect()

    def collect(self, unused_s: float = KEEP_PARTS_S) -> None:
        """Delete the parts of transfers that have not gone on for `unused_s` seconds."""
        self._collected = time.monotonic()
        with self._lock:
            active = {writer.part for writer in self._active.values()}
            for part in self._incoming.iterdir():
                if part not in active and part.stat().st_mtime < time.time() - unused_s:
                    part.unlink()

    def forget(self, transfer_id: str) -> None:
        """Delete what an interrupted transfer has left: it will not go on."""
        with self._lock:
            if transfer_id not in self._active:
                for part in self._incoming.glob(f"{_prefix(transfer_id)}.*.part"):
                    part.unlink()

    def has(self, digest: str) -> bool:
        """Return whether the blob is here.

        Raises:
            ModelFormatError: `digest` is not one.
        """
        return self._file(digest).exists()

    def has_whole(self, digest: str) -> bool:
        """Return whether the blob is here and `checked`; a damaged one makes room for another."""
        with self._reading(digest):
            try:
                self.checked(digest)
            except NotFoundError:
                return False
            except DataLossError as error:
                log.error("it is dropped and wanted again: %s", error)
                self.delete(digest)
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
    ) -> "_FileWriter":
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
    ) -> "_FileWriter":
        check_digest(blob.digest)
        if blob.size < 0:
            raise InvalidArgumentError(f"{blob.size} is not a size in bytes", field="blob.size")
        if manifest is not None:
            model_check(manifest, blob.size)
        if self.has_whole(blob.digest):
            return self._received_before(transfer_id, blob, manifest)
        prefix = _prefix(transfer_id)
        part = self._incoming / f"{prefix}.{self._file(blob.digest).name}.part"
        writer = _FileWriter(self, transfer_id, blob, manifest, part)
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
                    os.fchmod(file.fileno(), READ_ONLY)
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
        names = (path.name for path in self._root.iterdir() if path.is_file())
        return sorted(f"blake3:{name}" for name in names if not name.startswith("."))

    def _file(self, digest: str) -> Path:
        return self._root / check_digest(digest).partition(":")[2]

    def _received_before(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None
    ) -> "_FileWriter":
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
        return _FileWriter(self, transfer_id, blob, manifest, None)

    def _check_space(self, blob: ModelRef, part: Path) -> None:
        promised = sum(writer.promised_bytes for writer in self._active.values())
        missing = blob.size - (part.stat().st_size if part.exists() else 0)
        free = shutil.disk_usage(self._root).free - promised - self._reserve_bytes
        if missing > free:
            raise ResourceExhaustedError(
                f"{missing} bytes are to come, {max(free, 0)} are free beyond the reserve",
                rule="reserve_bytes",
                hint="free some disk space at the receiver",
            )

    def _publish(self, temporary: Path, digest: str) -> None:
        """Give a whole and durable file its final name; it is the same if it has been there."""
        path = self._file(digest)
        replace_durably(temporary, path)
        self._checked.add(digest)

    def _release(self, writer: "_FileWriter") -> None:
        with self._lock:
            if self._active.get(writer.transfer_id) is writer:
                del self._active[writer.transfer_id]


class _FileWriter:
    """`ports.BlobWriter` on a part file, or on nothing for a blob that is here already.

    It is over after `commit`, `suspend`, `discard` or any error: the first refused byte discards
    what came, a full disk keeps it. `suspend` and `discard` may then still be called.
    """

    def __init__(
        self,
        store: FileBlobStore,
        transfer_id: str,
        blob: ModelRef,
        manifest: Manifest | PartOf | None,
        part: Path | None,
    ) -> None:
        self.transfer_id = transfer_id
        self._store = store
        self._blob = blob
        self._manifest = manifest
        self.part = part
        self._file: FileIO | None = None
        self._set_aside = (
            blob.size if part is None else 0
        )  # up to which offset the disk has room for certain
        self._can_set_aside = True
        self._kept = 0  # bytes that an earlier process or connection has left
        self._started = 0  # up to which offset bytes are on their way to the disk
        self._offset = 0 if part is not None else blob.size
        self._start_anew()

    @property
    def offset(self) -> int:
        """Bytes received so far."""
        return self._offset

    @property
    def missing_bytes(self) -> int:
        """Bytes still to come."""
        return self._blob.size - self._offset

    @property
    def promised_bytes(self) -> int:
        """Bytes still to come for which no disk space is taken yet."""
        return self._blob.size - max(self._offset, self._set_aside)

    def open(self) -> None:
        """Open the part file and check again what it holds; what is no good is dropped."""
        assert self.part is not None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            handle = os.open(self.part, flags, PRIVATE_FILE)
        except PermissionError:  # it was whole already, and a kill kept it from its name
            os.chmod(self.part, PRIVATE_FILE)
            handle = os.open(self.part, flags, PRIVATE_FILE)
        self._file = FileIO(handle, "r+b")
        try:
            while chunk := self._file.read(STEP_BYTES):
                self._check(chunk)
                self._count(chunk)
        except InvalidArgumentError:
            self._file.truncate(0)
            self._file.seek(0)
            self._offset = 0
            self._start_anew()
        self._kept = self._offset

    def write(self, chunk: bytes) -> None:
        """Add bytes in order; see `ports.BlobWriter`.

        Raises:
            InvalidArgumentError: more bytes than declared; what came is discarded.
            ModelFormatError: the tensor header or a value is refused; what came is discarded.
            ResourceExhaustedError: the disk is full; what came can be resumed.
            FailedPreconditionError: the writer is over.
        """
        try:
            self._check(chunk)
            with explaining_shortage():
                self._make_room(len(chunk))
                rest = memoryview(chunk)
                while rest:
                    rest = rest[self._opened().write(rest) :]
            self._send_to_disk(self._offset + len(chunk))
        except InvalidArgumentError as error:
            self.discard()
            if self._kept:
                raise _damaged_part() from error
            raise
        except BaseException:
            self.suspend()
            raise
        self._count(chunk)

    def commit(self) -> None:
        """Check length and digest, fsync, and make the blob visible.

        Raises:
            InvalidArgumentError: length or digest differ from what was declared; discarded.
            UnavailableError: they do, but it may be what was kept that is damaged; discarded.
            ResourceExhaustedError: the disk is full; discarded.
            FailedPreconditionError: the writer is over, without the blob.
        """
        if self.part is None:
            return
        file = self._opened()
        try:
            if self._offset != self._blob.size:
                raise InvalidArgumentError(
                    f"{self._offset} of {self._blob.size} bytes arrived", field="blob.size"
                )
            if self._kept and self._digest.text() != self._blob.digest:
                raise _damaged_part()
            if self._digest.text() != self._blob.digest:
                raise InvalidArgumentError(
                    f"the bytes have digest {self._digest.text()}, declared was "
                    f"{self._blob.digest}",
                    field="blob.digest",
                )
            if self._model is not None:
                self._model.end()
            with explaining_shortage():
                os.fchmod(file.fileno(), READ_ONLY)
                sync(file.fileno(), data_only=True)
                self._store._publish(self.part, self._blob.digest)
        finally:
            self.discard()

    def suspend(self) -> None:
        """Keep what was received, so that the transfer can resume."""
        if self._file is not None:
            if self._set_aside > self._file.tell():  # gives back what was set aside, not used
                with suppress(OSError):
                    self._file.truncate(self._file.tell())
            self._file.close()
            self._file = None
        self._store._release(self)

    def discard(self) -> None:
        """Forget what was received."""
        if self._file is not None and self.part is not None:
            self.part.unlink(missing_ok=True)
            self._set_aside = 0
        self.suspend()

    def _make_room(self, count: int) -> None:
        if self._offset + count <= self._set_aside or not self._can_set_aside:
            return
        upto = min(self._blob.size, max(self._offset + count, self._set_aside + AHEAD_BYTES))
        begin = max(self._offset, self._set_aside)
        self._can_set_aside = set_aside(self._opened().fileno(), begin, upto - begin)
        if self._can_set_aside:
            self._set_aside = upto

    def _send_to_disk(self, upto: int) -> None:
        if upto - self._started >= SYNC_STEP_BYTES:
            start_writing(self._opened().fileno(), self._started, upto - self._started)
            self._started = upto

    def _opened(self) -> FileIO:
        if self._file is None:
            raise FailedPreconditionError("this transfer is over")
        return self._file

    def _start_anew(self) -> None:
        self._digest = Digest()
        expected, size = self._manifest, self._blob.size
        self._model = None if expected is None else model_check(expected, size)

    def _check(self, chunk: bytes) -> None:
        if len(chunk) > self.missing_bytes:
            raise InvalidArgumentError(
                f"more than the declared {self._blob.size} bytes arrived", field="blob.size"
            )
        if self._model is not None:
            self._model.feed(chunk)

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._offset += len(chunk)


def _damaged_part() -> UnavailableError:
    """Return what a sender hears who may not be to blame for bytes that are refused."""
    return UnavailableError(
        "what was kept of an interrupted transfer may not be what came then",
        hint="send it again, from its beginning",
    )


def _prefix(transfer_id: str) -> str:
    return sha256(transfer_id.encode()).hexdigest()
