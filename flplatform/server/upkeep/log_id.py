"""The id that an event log and the state folder beside it have in common.

A server that works on a log which is not its folder's, such as an empty one, takes every model in
the folder for one that nothing needs, and gives the numbers of its runs away again. The id is
random and made with the log; whatever copies a log or a folder whole copies it too.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flplatform.core.errors import ConfigError
from flplatform.files.durable import private_dir, write_atomic
from flplatform.server.upkeep.place import AUDIT, Place
from flplatform.store.blobs import digests_in

LOG_ID = "log-id"
"""In the state folder, as text."""
ADVICE = (
    "state_url names another database, schema or file than before, or the log or the folder was "
    "lost, emptied or not restored: correct state_url in local/resources.yml, or restore a backup "
    "(fl_state restore); to begin anew on purpose, move the state folder away and name an empty "
    "database"
)
_REMOVE = "if state_url names the log of this state folder, remove the file: it is made again"
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 200


@dataclass(frozen=True, slots=True)
class OwnLog:
    """What a state folder knows about the log that it belongs to.

    Attributes:
        folder: the state folder.
        blobs: where its blobs are.
    """

    folder: Path
    blobs: Path

    @classmethod
    def of(cls, place: Place) -> "OwnLog":
        """Return what the folder of a state, or of a backup, knows."""
        return cls(place.folder, place.blobs.root)

    @property
    def id(self) -> str:
        """The id of the log; empty in a new folder, and in one that the release before has left.

        Raises:
            ConfigError: what tells it is damaged.
            OSError: it cannot be read.
        """
        try:
            with (self.folder / LOG_ID).open("rb") as file:
                text = file.read(_MOST_BYTES).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
        if not _ID.fullmatch(text):
            raise ConfigError(f"{self.folder / LOG_ID} is damaged: it is no id", hint=_REMOVE)
        return text

    def keep(self, origin: str) -> None:
        """Have the folder belong to the log of this id, durable on return.

        Raises:
            OSError: the disk refused.
        """
        if self.id != origin:
            write_atomic(private_dir(self.folder) / LOG_ID, f"{origin}\n".encode())

    def demand(self, name: str, origin: str, is_empty: bool) -> None:
        """Refuse a log that is not the folder's; see `store.state.Admit`.

        Raises:
            ConfigError: it is another one, or nobody knows.
            OSError: the folder cannot be read.
        """
        if why := self.why_another(name, origin, is_empty):
            raise ConfigError(why, hint=ADVICE)

    def why_another(self, name: str, origin: str, is_empty: bool) -> str:
        """Return why a log is not the folder's; empty if nothing tells so.

        Args:
            name: what messages call it.
            origin: its id; empty if it carries none yet.
            is_empty: whether it holds no event.

        Raises:
            ConfigError: what tells the folder's log is damaged.
            OSError: the folder cannot be read.
        """
        known = self.id
        if known:
            if known == origin:
                return ""
            found = f"log {origin}" if origin else "a log without an id"
            found += ", which is empty" if is_empty else ""
            belongs = f"the state folder {self.folder} belongs to log {known} (see {LOG_ID})"
            return f"{belongs}, but {name} is {found}"
        has_blobs = self.blobs.is_dir() and bool(digests_in(self.blobs))
        if is_empty and has_blobs:
            return f"there are models in {self.blobs}, but the log {name} is empty"
        if not (is_empty or has_blobs or self._is_audited()):
            named = f"{name} ({origin})" if origin else name
            return f"the log {named} holds events, but the state folder {self.folder} is a new one"
        return ""

    def _is_audited(self) -> bool:
        audit = self.folder / AUDIT
        return audit.exists() and audit.stat().st_size > 0
