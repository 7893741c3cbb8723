"""A blob on its way: the file that holds what has come, checked and counted as it comes."""

import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, PartOf
from flplatform.files.digest import STEP_BYTES, Digest
from flplatform.files.durable import PRIVATE_FILE, READ_ONLY_FILE, sync
from flplatform.files.modelfile import model_check
from flplatform.files.shortage import explaining_shortage
from flplatform.files.writing import set_aside, start_writing

AHEAD_BYTES = 64 << 20
"""Disk space set aside ahead of what has come: no more than that is lent to a mere declaration."""

SYNC_STEP_BYTES = 8 << 20
"""So much of a file is sent on its way to the disk at a time."""


class PartFile:
    """`ports.BlobWriter` on a part file, or on nothing for a blob that is here already.

    Args:
        transfer_id: names the transfer.
        blob: what it will be.
        manifest: the tensors that it must hold, or None.
        part: the file; None for a blob that is here.
        publish: gives the whole file, durable, the name of its digest.
        release: told when it is over.

    It is over after `commit`, `suspend`, `discard` or any error: the first refused byte discards
    what came, a full disk keeps it. `suspend` and `discard` may then still be called.
    """

    def __init__(
        self,
        transfer_id: str,
        blob: ModelRef,
        manifest: Manifest | PartOf | None,
        part: Path | None,
        publish: Callable[[Path, str], None],
        release: Callable[["PartFile"], None],
    ) -> None:
        self.transfer_id = transfer_id
        self._publish = publish
        self._release = release
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
            with explaining_shortage():
                while chunk := self._file.read(STEP_BYTES):
                    self._check(chunk)
                    self._count(chunk)
        except (InvalidArgumentError, OSError):  # the same sector would stay bad for ever
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
                os.fchmod(file.fileno(), READ_ONLY_FILE)
                sync(file.fileno(), data_only=True)
                self._publish(self.part, self._blob.digest)
        finally:
            self.discard()

    def suspend(self) -> None:
        """Keep what was received, so that the transfer can resume."""
        file, self._file = self._file, None
        try:
            if file is not None:
                with suppress(OSError):
                    if self._set_aside > file.tell():  # gives back what was set aside, not used
                        file.truncate(file.tell())
                file.close()
        finally:
            self._release(self)

    def discard(self) -> None:
        """Forget what was received."""
        try:
            if self._file is not None and self.part is not None:
                self.part.unlink(missing_ok=True)
                self._set_aside = 0
        finally:
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
