"""What may be uploaded to and downloaded from the admin port."""

import re
from collections.abc import Callable
from pathlib import Path

from flplatform.admin.rights import Rights
from flplatform.admin.user_files import UserFiles, not_announced
from flplatform.core.config import PERSON_PATTERN, ServerLimits
from flplatform.core.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import Manifest, PartOf
from flplatform.core.ports import BlobStore, BlobWriter
from flplatform.hci import AdminSession
from flplatform.rpc.interceptors import Caller

_TRANSFER = re.compile(r"[0-9a-f]{32}/(job|model)")
_FILE = re.compile(rf"file/({PERSON_PATTERN})/([0-9a-f]{{64}})", re.ASCII)


class PortBlobs:
    """`ports.BlobStore` of the admin port: the federation's blobs, and users' files beside them.

    Args:
        blobs: packages and models.
        user_files: files of users.
    """

    def __init__(self, blobs: BlobStore, user_files: UserFiles) -> None:
        self._blobs = blobs
        self._user_files = user_files

    def has(self, digest: str) -> bool:
        """Return whether the federation has a blob."""
        return self._blobs.has(digest)

    def has_whole(self, digest: str) -> bool:
        """Return whether the federation has a blob, undamaged."""
        return self._blobs.has_whole(digest)

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Make a blob of the federation's."""
        return self._blobs.create(fill)

    def delete(self, digest: str) -> None:
        """Remove a blob of the federation's."""
        self._blobs.delete(digest)

    def digests(self) -> list[str]:
        """Return the digests of the federation's blobs."""
        return self._blobs.digests()

    def path(self, digest: str) -> Path:
        """Return the file of a blob; whoever was granted a digest may have it from anywhere.

        Raises:
            NotFoundError: no such blob.
        """
        return self._staged(digest) or self._blobs.path(digest)

    def checked(self, digest: str) -> Path:
        """Return the file of a blob, undamaged, from where `path` has it.

        Raises:
            NotFoundError: no such blob.
            DataLossError: it is damaged.
        """
        return self._staged(digest) or self._blobs.checked(digest)

    def _staged(self, digest: str) -> Path | None:
        return None if self._blobs.has(digest) else self._user_files.path(digest)

    def receive(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None = None
    ) -> BlobWriter:
        """Start or resume receiving a blob, see `ports.BlobStore`: by its id, at its place.

        Raises:
            PermissionDeniedError: it is a file that its user has not announced.
        """
        if match := _FILE.fullmatch(transfer_id):
            return self._user_files.receive(match[1], blob)
        return self._blobs.receive(transfer_id, blob, manifest)

    def forget(self, transfer_id: str) -> None:
        """Delete what an interrupted transfer has left."""
        match = _FILE.fullmatch(transfer_id)
        store: BlobStore = self._user_files.store(match[1]) if match else self._blobs
        store.forget(transfer_id)


class Transfers:
    """Admits uploads of submissions, and releases what `download_model` has just granted.

    A model is not downloaded by knowing its digest: the command checks the right on its run and
    grants the digest to the session, for as long as that lasts.

    Args:
        rights: who may submit.
        limits: of sizes.
        session_of: returns the session of a caller's token; raises UnauthenticatedError.
        user_files: files of users.
    """

    def __init__(
        self,
        rights: Rights,
        limits: ServerLimits,
        session_of: Callable[[Caller], AdminSession],
        user_files: UserFiles,
    ) -> None:
        self.user_files = user_files
        self._rights = rights
        self._session_of = session_of
        self._max_bytes = {"job": limits.max_job_bytes, "model": limits.max_model_bytes}
        self._granted: dict[str, set[str]] = {}

    def admit(self, caller: Caller, transfer_id: str, blob: ModelRef) -> None:
        """Admit a submission's package or model, or a user's own file; see `rpc.streams.Admit`.

        Whether the file was announced only `PortBlobs.receive` can tell: it is on the disk.

        Raises:
            PermissionDeniedError: the caller may not submit, or it is another's file.
            InvalidArgumentError: the id is not that of a submission's part, nor of a file.
            ResourceExhaustedError: it is too large.
        """
        if (match := _FILE.fullmatch(transfer_id)) is not None:
            self._rights.demand_own_files(caller.identity)
            if (match[1], f"blake3:{match[2]}") != (caller.identity.name, blob.digest):
                raise not_announced()
            return
        self._rights.demand_submit(caller.identity)
        match = _TRANSFER.fullmatch(transfer_id)
        if match is None:
            raise InvalidArgumentError(
                "is not SUBMISSION/job or SUBMISSION/model", field="transfer_id"
            )
        largest = self._max_bytes[match[1]]
        if blob.size > largest:
            raise ResourceExhaustedError(
                f"the {match[1]} has {blob.size} bytes; this server takes {largest}",
                rule=f"max_{match[1]}_bytes",
            )

    def release(self, caller: Caller, digest: str) -> None:
        """Release a download; see `rpc.streams.Release`.

        Raises:
            PermissionDeniedError: the digest was not granted to the caller's session.
        """
        if digest not in self._granted.get(self._session_of(caller).id, ()):
            raise PermissionDeniedError(
                "this blob was not granted to this session",
                rule="download_model",
                hint="download_model asks for it",
            )

    def grant(self, session: AdminSession, digest: str) -> None:
        """Let a session download a blob; the caller has checked its right."""
        self._granted.setdefault(session.id, set()).add(digest)

    def end_session(self, session: AdminSession) -> None:
        """Forget what was granted to a session."""
        self._granted.pop(session.id, None)
