"""The event that was stored last, noted beside the log: a log that has lost its end is noticed.

What takes events from a log takes the latest first: an older file put back by hand, a write-ahead
log that SQLite reads only as far as it is whole, a standby that was behind. Such a log is whole in
itself, and names none of the models that came after its end.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flplatform.core.errors import ConfigError
from flplatform.core.ports import Row
from flplatform.core.strict import Strict, parse_json
from flplatform.files.durable import PRIVATE_FILE
from flplatform.store.snapshot import DamagedRow

log = logging.getLogger(__name__)

LOG_HEAD = "log-head"
"""In the state folder."""
IF_MEANT = (
    "put the right log back, or restore a backup; if this log is meant, stop the server and remove "
    f"state/{LOG_HEAD}: the next start then removes the models that this log does not name"
)
_LENGTH = 256
"""Bytes of the file, written over in place: within one sector of a disk, and never more."""


class _Head(Strict):
    stream: str
    seq: int
    time: str


@dataclass(frozen=True, slots=True)
class LogHead:
    """What a state folder knows about the end of its log.

    It is written after each commit and not synced: it outlives the process, but a power cut may
    take it back by some seconds. It never names an event that is not durable.

    Attributes:
        folder: the state folder; it exists.
    """

    folder: Path

    def note(self, row: Row) -> None:
        """Remember an event that is durable; one that cannot be noted is passed over."""
        head = json.dumps({name: getattr(row, name) for name in _Head.model_fields})
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            handle = os.open(self.folder / LOG_HEAD, flags, PRIVATE_FILE)
            try:
                os.pwrite(handle, f"{head:{_LENGTH - 1}}\n".encode(), 0)
            finally:
                os.close(handle)
        except OSError as error:
            log.warning("%s stays at an older event: %s", LOG_HEAD, error)

    def why_behind(self, name: str, read: Callable[[str], Iterable[Row | DamagedRow]]) -> str:
        """Return why a log has lost its end; empty if nothing tells so.

        Args:
            name: what messages call the log.
            read: returns the rows of one of its streams.

        Raises:
            FLError: of `read`.
        """
        path = self.folder / LOG_HEAD
        try:
            with path.open("rb") as file:
                text = file.read(_LENGTH).strip(b"\0 \n")
            if not text:
                return ""  # its first writing has not got through
            head = parse_json(_Head, text, str(path))
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        except ConfigError as error:
            return f"{path} is damaged: {error.message}"
        for row in read(head.stream):
            if row.seq == head.seq and (isinstance(row, DamagedRow) or row.time == head.time):
                return ""
        return (
            f"{name} has lost its end, or is an older one: event {head.seq} of {head.stream}, "
            f"stored at {head.time} (see {LOG_HEAD}), is not in it"
        )
