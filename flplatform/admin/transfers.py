"""What may be uploaded to and downloaded from the admin port."""

import re
from collections.abc import Callable

from flplatform.admin.rights import Rights
from flplatform.core.config import ServerLimits
from flplatform.core.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.hci import AdminSession
from flplatform.rpc.interceptors import Caller

_TRANSFER = re.compile(r"[0-9a-f]{32}/(job|model)")


class Transfers:
    """Admits uploads of submissions, and releases what `download_model` has just granted.

    A model is not downloaded by knowing its digest: the command checks the right on its run and
    grants the digest to the session, for as long as that lasts.

    Args:
        rights: who may submit.
        limits: of sizes.
        session_of: returns the session of a caller's token; raises UnauthenticatedError.
    """

    def __init__(
        self, rights: Rights, limits: ServerLimits, session_of: Callable[[Caller], AdminSession]
    ) -> None:
        self._rights = rights
        self._session_of = session_of
        self._max_bytes = {"job": limits.max_job_bytes, "model": limits.max_model_bytes}
        self._granted: dict[str, set[str]] = {}

    def admit(self, caller: Caller, transfer_id: str, blob: ModelRef) -> None:
        """Admit the upload of a submission's package or model; see `rpc.streams.Admit`.

        Raises:
            PermissionDeniedError: the caller may not submit.
            InvalidArgumentError: the id is not that of a submission's part.
            ResourceExhaustedError: it is too large.
        """
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
