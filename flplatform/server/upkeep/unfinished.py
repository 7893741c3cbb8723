"""The marker of a restore that has begun to change a kit: until it has ended, no server starts."""

import shlex
from pathlib import Path

from flplatform.core.errors import ConfigError
from flplatform.core.strict import Strict, parse_json
from flplatform.files.durable import fsync_dir, write_atomic
from flplatform.files.lock import PROCESS_LOCK, is_held
from flplatform.security.kit import Kit

MARKER = "restoring.json"
"""In the kit's folder, from before the first change of a restore until after its last one."""
_DAMAGED = (
    "remove it, then run fl_state restore BACKUP KIT --move-aside: it renames whatever is there; a "
    "former state lies in state.before-TIME"
)


class Unfinished(Strict):
    """`restoring.json`; the first restore writes it, those that are to end it keep what it says.

    Attributes:
        backup: the folder of the backup.
        options: of the command.
        stamp: ends the names of what was moved aside.
        had_state: whether there was a state to be moved aside.
        had_log: the same of a log that lies outside of the state.
    """

    backup: str
    options: tuple[str, ...]
    stamp: str
    had_state: bool
    had_log: bool

    def told(self, kit: Path, *, locked: bool = False) -> str:
        """Return what to tell and do about it.

        Args:
            kit: its folder.
            locked: whether this process holds its lock; else a restore may still be at work.
        """
        if not locked and is_held(kit / PROCESS_LOCK):
            return f"a restore of {self.backup} is at work in {kit}: wait until it has ended"
        command = shlex.join(["fl_state", "restore", self.backup, str(kit), *self.options])
        return f"a restore did not end (see {kit / MARKER}); run it again: {command}"

    def begin(self, kit: Path) -> None:
        """Write the marker, durable on return.

        Raises:
            OSError: the disk refused.
        """
        write_atomic(kit / MARKER, self.model_dump_json(indent=1).encode())

    @staticmethod
    def end(kit: Path) -> None:
        """Remove the marker: what was restored is whole, and durable."""
        (kit / MARKER).unlink()
        fsync_dir(kit)


def unfinished_in(kit: Path) -> Unfinished | None:
    """Return what a restore of this kit left that did not end; None if there is no such thing.

    Raises:
        ConfigError: the marker is damaged; says what to do.
    """
    path = kit / MARKER
    try:
        return parse_json(Unfinished, path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (ConfigError, OSError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"a restore did not end, and {text}", hint=_DAMAGED) from error


def told_of(kit: Path) -> str:
    """Return what to tell of a restore that did not end, its marker damaged or not; else empty."""
    try:
        found = unfinished_in(kit)
    except ConfigError as error:
        return str(error)
    return found.told(kit) if found else ""


def demand_finished(kit: Kit) -> None:
    """Refuse a state of which nobody knows whether it is the old one, the new one, or neither.

    Raises:
        ConfigError: a restore did not end.
    """
    if found := unfinished_in(kit.folder):
        raise ConfigError(found.told(kit.folder, locked=True))
