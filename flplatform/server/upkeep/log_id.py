"""The id that an event log and the state folder beside it have in common.

A server that works on a log which is not its folder's, such as an empty one, takes every model in
the folder for one that nothing needs, and gives the numbers of its runs away again. The id is
random and made with the log; whatever copies a log or a folder whole copies it too.

The kit notes the id as well, outside of the state folder: a server whose folder is not mounted
would begin anew, and the sites would throw their runs away.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from flplatform.core.errors import ConfigError
from flplatform.files.durable import fsync_dir, private_dir, why_no_folder, write_atomic
from flplatform.server.upkeep.place import AUDIT, Place, contents
from flplatform.store.blobs import digests_in
from flplatform.store.reading import PUT_THERE

log = logging.getLogger(__name__)

LOG_ID = "log-id"
"""In the state folder, as text; and in the kit, that of the state that it had the last time."""
ADVICE = (
    "state_url names another database, schema or file than before, or the log or the folder was "
    "lost, emptied or not restored: correct state_url in local/resources.yml, or restore a backup "
    f"(fl_state restore); to begin anew on purpose, move the state folder away, remove {LOG_ID} "
    "in the kit and name an empty database"
)
LOST = (
    "mount the state folder, or put back what was in it, or restore a backup (fl_state restore); "
    "to begin anew on purpose, without the runs, sites and revocations of before, remove "
)
"""What to do about a lost state; the path of the kit's `log-id` follows."""
_SERVED = "a server has worked on this kit before"
_REMOVE = "if state_url names the log of this state folder, remove the file: it is made again"
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 200


@dataclass(frozen=True, slots=True)
class OwnLog:
    """What a state folder knows about the log that it belongs to.

    Attributes:
        folder: the state folder.
        blobs: where its blobs are.
        kit: the kit's folder, where the id is noted too; None for a backup, or what is to be one.
    """

    folder: Path
    blobs: Path
    kit: Path | None = None

    @classmethod
    def of(cls, place: Place) -> "OwnLog":
        """Return what the folder of a state, or of a backup, knows."""
        return cls(place.folder, place.blobs.root, None if place.blobs_in else place.kit.folder)

    @property
    def id(self) -> str:
        """The id of the log; empty in a new folder, and in one that the release before has left.

        Raises:
            ConfigError: what tells it is damaged.
            OSError: it cannot be read.
        """
        return _id_in(self.folder / LOG_ID, _REMOVE)

    @property
    def noted(self) -> str:
        """The id that the kit has noted; empty if it has none.

        Raises:
            ConfigError: it cannot be read, or is damaged.
        """
        if self.kit is None:
            return ""
        path = self.kit / LOG_ID
        try:
            return _id_in(path, f"{LOST}{path}")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error

    def keep(self, origin: str) -> None:
        """Have the folder belong to the log of this id, durable on return; the kit notes it.

        Raises:
            OSError: the disk refused.
        """
        if self.id != origin:
            write_atomic(private_dir(self.folder) / LOG_ID, f"{origin}\n".encode())
        self.note(origin)

    def note(self, origin: str) -> None:
        """Note in the kit to which log its state belongs; what cannot be noted is told.

        Args:
            origin: its id; empty if it carries none yet.
        """
        if self.kit is None:
            return
        try:
            before = self.noted
        except ConfigError:
            before = "?"
        if before == origin:
            return
        try:
            if origin:
                write_atomic(self.kit / LOG_ID, f"{origin}\n".encode())
            else:
                (self.kit / LOG_ID).unlink()
                fsync_dir(self.kit)
        except OSError as error:
            log.warning("a loss of the state folder would go unnoticed: %s", error)
        else:
            if before and origin:
                log.warning("the state is another than before: log %s, not %s", origin, before)

    def why_lost(self) -> str:
        """Return why the state of a server is lost; empty if nothing tells so.

        Raises:
            ConfigError: what the kit has noted cannot be read, or is damaged.
        """
        if why_no_folder(self.folder) or any(contents(self.folder)) or not (noted := self.noted):
            return ""
        return f"{_SERVED} (log {noted}), but the state folder {self.folder} is empty"

    def demand_state(self) -> None:
        """Refuse to go on with the empty folder of a server that has worked before.

        Raises:
            ConfigError: it is lost, or something else is in its place; says what to do.
        """
        if why := why_no_folder(self.folder):
            raise ConfigError(why, hint=PUT_THERE)
        if why := self.why_lost():
            raise ConfigError(why, hint=self.how_to_find())

    def how_to_find(self) -> str:
        """Return what to do about a state that is lost."""
        return f"{LOST}{self.kit}/{LOG_ID}"

    def demand(self, name: str, origin: str, is_empty: bool) -> None:
        """Refuse a log that is not the folder's; see `store.state.Admit`.

        Raises:
            ConfigError: it is another one, or nobody knows.
            OSError: the folder cannot be read.
        """
        if why := self.why_another(name, origin, is_empty):
            raise ConfigError(why, hint=ADVICE)
        if not self.id and is_empty and (noted := self.noted) not in ("", origin):
            raise ConfigError(
                f"{_SERVED} (log {noted}), but the state folder {self.folder} has no {LOG_ID}, "
                f"and the log {name} is empty",
                hint=self.how_to_find(),
            )

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


def _id_in(path: Path, advice: str) -> str:
    """Return the id in a file; empty if there is no such file.

    Raises:
        ConfigError: it holds anything else.
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    if not _ID.fullmatch(text):
        raise ConfigError(f"{path} is damaged: it is no id", hint=advice)
    return text
