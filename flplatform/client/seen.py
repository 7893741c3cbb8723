"""Ids of signed commands already obeyed, on disk: each counts once, whatever the server replays."""

import json
from datetime import UTC, datetime
from pathlib import Path

from flplatform.core.errors import DataLossError, PermissionDeniedError
from flplatform.files.durable import write_atomic
from flplatform.security.signing import MAX_SKEW_S

MAX_IDS = 100_000


class SeenIds:
    """Remembers ids until their orders have expired."""

    def __init__(self, path: Path, skew_s: float = MAX_SKEW_S) -> None:
        self._path = path
        self._skew_s = skew_s
        self._until: dict[str, float] = {}
        if path.exists():
            try:
                found = json.loads(path.read_bytes())
                self._until = {str(key): float(end) for key, end in found.items()}
            except (ValueError, AttributeError, TypeError):
                # Going on without it would let old commands be replayed.
                raise DataLossError(
                    f"{path} is damaged",
                    hint="remove it once no signed command can still be valid (a day from now)",
                ) from None

    def use(self, order_id: str, not_after: datetime) -> None:
        """Use up an id, durably, before it is acted upon.

        If that fails the id is used up as long as this process lives, and durably with the next.

        Raises:
            PermissionDeniedError: the id was used before.
            OSError: it cannot be remembered, so a command that changes anything must not be obeyed.
        """
        now = datetime.now(UTC).timestamp()
        if order_id in self._until:
            raise PermissionDeniedError("this command was carried out already", rule="single use")
        # Orders are accepted until the clocks' skew after their end; keep ids twice as long.
        self._until = {key: end for key, end in self._until.items() if end + 2 * self._skew_s > now}
        if len(self._until) >= MAX_IDS:
            raise PermissionDeniedError("too many commands at once", rule="command rate")
        self._until[order_id] = not_after.timestamp()
        write_atomic(self._path, json.dumps(self._until).encode())
