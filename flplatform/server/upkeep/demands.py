"""What must hold before a restore begins to change anything: what is refused here costs nothing."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flplatform.core.errors import (
    ConfigError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.files.durable import private_dir
from flplatform.files.lock import held
from flplatform.server.upkeep.asides import SQLITE_ENDS
from flplatform.server.upkeep.building import in_building
from flplatform.server.upkeep.place import LOG, Place, contents
from flplatform.server.upkeep.streams import Stored
from flplatform.server.upkeep.unfinished import Unfinished
from flplatform.store.snapshot import DamagedRow, snapshot, sqlite_file
from flplatform.store.targets import demand_writable

_MOST_VERSION = (1 << 31) - 1
_INTO_SQLITE = (
    "take state_url out of local/resources.yml, or name a SQLite file there, and restore without "
    "--with-local"
)
_EMPTY = "name an empty database or schema in state_url"


@contextmanager
def log_held(place: Place) -> Iterator[None]:
    """Hold the log if it is a SQLite file elsewhere: another kit's server may have it open.

    Raises:
        FailedPreconditionError: it has.
        ConfigError: no log can be kept there.
    """
    with ExitStack() as stack:
        if file := place.log_file:
            if file.is_dir():
                raise ConfigError(f"state_url: {file} is a folder", hint="name a file")
            if Path(os.path.realpath(file.parent)).is_relative_to(place.folder):
                raise ConfigError(
                    f"state_url: {file} lies in the state folder, which a restore renames",
                    hint="name a file elsewhere, or take state_url out of local/resources.yml",
                )
            lock = file.with_name(f"{file.name}.lock")
            try:
                private_dir(file.parent)
                stack.enter_context(held(lock, f"the event log {file}"))
                if not os.access(file.parent, os.W_OK):
                    raise OSError(errno.EACCES, f"nothing can be written in {file.parent}")
            except (OSError, ConfigError) as error:
                why = error.strerror if isinstance(error, OSError) else error.message
                raise ConfigError(
                    f"state_url: {file} cannot be written: {why}",
                    hint="name another file, or mend its folder",
                ) from error
        yield


def demand_possible(
    backup: Path, place: Place, before: Unfinished | None, move_aside: bool
) -> None:
    """Refuse what could not be ended.

    Args:
        backup: its folder.
        place: where the state goes, resolved.
        before: what a restore left that did not end.
        move_aside: whether what is there may be renamed.

    Raises:
        FLError: why it cannot be done, and what to do.
    """
    _demand_apart(backup, place)
    _demand_movable(place, before)
    remote = sqlite_file(place.target) is None
    if remote:
        _demand_storable(backup)
    if before is None:
        _demand_vacant(place, move_aside)
    elif remote:
        _demand_same(backup, place)
    if remote:
        demand_writable(place.target)


def _demand_apart(backup: Path, place: Place) -> None:
    """Refuse a backup that the restore itself would rename, or remove."""
    real = Path(os.path.realpath(backup))
    for path in (place.folder, *in_building(place)):
        if real.is_relative_to(os.path.realpath(path)):
            raise InvalidArgumentError(
                f"{backup} lies in {path}, which the restore renames", hint="move it elsewhere"
            )
    if place.log_file and Path(os.path.realpath(place.log_file)).is_relative_to(real):
        raise ConfigError(
            f"state_url: {place.log_file} is a file of the backup", hint="name another one"
        )


def _demand_movable(place: Place, before: Unfinished | None) -> None:
    """Refuse what cannot be renamed, or is not there for want of its disk."""
    link = place.kit.state_folder()
    for path, hint in (
        (
            place.folder,
            f"have {link} be a link to a folder on a disk that is mounted outside of the kit; or "
            "restore into a copy of the kit without its state, and move what is then in the copy's "
            "state folder here",
        ),
        (place.log_file, "name a file in a folder of that disk in state_url"),
    ):
        if path and os.path.ismount(path):
            raise FailedPreconditionError(
                f"{path} is a mount point and cannot be renamed", hint=hint
            )
    unfinished = before is not None and place.folder.parent.is_dir()  # it may be renamed already
    if link.is_symlink() and not link.exists() and not unfinished:
        raise FailedPreconditionError(
            f"{link} is a link to {place.folder}, which is not there",
            hint="mount its disk, or remove the link",
        )


def _demand_storable(backup: Path) -> None:
    """Refuse a log that PostgreSQL does not take as it is: SQLite holds anything."""
    for stream, rows in streams_of(backup / LOG)[1].items():
        for number, row in enumerate(rows, 1):
            if isinstance(row, DamagedRow):
                why = row.text
            elif row.seq != number:
                why = "is missing"
            elif any("\0" in text for text in (stream, row.time, row.type, row.body)):
                why = "holds a NUL character"
            elif abs(row.version) > _MOST_VERSION:
                why = "has a version that is no 32-bit number"
            else:
                continue
            raise FailedPreconditionError(
                f"the log in {backup} has gaps or damaged rows, and PostgreSQL takes no such log: "
                f"{stream}#{number} {why}",
                hint=_INTO_SQLITE,
            )


def _demand_vacant(place: Place, move_aside: bool) -> None:
    """Refuse to put a state where one is."""
    hint = "--move-aside renames it; nothing is ever overwritten"
    if not move_aside and any(contents(place.folder)):
        raise FailedPreconditionError(f"there is a state in {place.folder}", hint=hint)
    if sqlite_file(place.target):
        if place.log_file and is_there(place.log_file) and not move_aside:
            raise FailedPreconditionError(f"there is an event log {place.log_file}", hint=hint)
        return
    try:
        with place.snapshot() as log:
            streams = log.streams()
    except NotFoundError:
        return
    if streams:
        raise FailedPreconditionError(
            f"{log.name} holds the events of {len(streams)} streams", hint=_EMPTY
        )


def _demand_same(backup: Path, place: Place) -> None:
    """Refuse to end a restore in a database that holds something else than its backup."""
    try:
        found = streams_of(place.target)[1]
    except NotFoundError:
        return
    if found and found != streams_of(backup / LOG)[1]:
        raise FailedPreconditionError(
            f"the database of state_url does not hold the events of {backup}", hint=_EMPTY
        )


def is_there(file: Path) -> bool:
    """Return whether there is a SQLite file, or what is left of one: SQLite would use it."""
    return any(Path(f"{file}{end}").exists() for end in ("", *SQLITE_ENDS))


def streams_of(target: str | Path) -> tuple[str, Mapping[str, list[Stored]]]:
    """Return what messages call a log, and all that it holds."""
    with snapshot(target) as log:
        return log.name, {stream: log.scan(stream) for stream in log.streams()}
