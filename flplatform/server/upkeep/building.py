"""A state made of a backup, beside the place that it goes to: what fails here changes nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from flplatform.core.config import override
from flplatform.core.errors import DataLossError, ResourceExhaustedError
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import READ_ONLY_FILE, fsync_dir, private_dir, write_atomic
from flplatform.files.shortage import shortage_in
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.security.kit import Local
from flplatform.server.upkeep.backup import LOCAL, STATE, Manifest
from flplatform.server.upkeep.log_id import LOG_ID, OwnLog
from flplatform.server.upkeep.place import AUDIT, BLOBS, LOG, Place
from flplatform.server.upkeep.taking import copy_file
from flplatform.server.upkeep.unfinished import MARKER
from flplatform.store.snapshot import sqlite_file

BUILDING = ".restoring"
"""Ends the names of what comes to be; what a restore that did not end has left."""
STAMP = "%Y%m%dT%H%M%S%fZ"
SPARE_BYTES = 1 << 20
"""For the record in the audit, folders and whatever else is small."""
DAMAGED_AUDIT = "audit-damaged"
"""Begins the name of a folder with an audit that cannot be gone on with."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """What becomes of the kit's local files.

    Attributes:
        written: file of the kit → that of the backup which takes its place.
        other: those that differ from the backup's and stay.
    """

    written: dict[Path, Path]
    other: tuple[str, ...]

    @classmethod
    def of(cls, backup: Path, manifest: Manifest, place: Place, write: bool) -> "LocalFiles":
        """Have the kit get those that it lacks; all of the backup's if `write`."""
        written, other = {}, []
        for name in manifest.files:
            if not name.startswith(f"{LOCAL}/"):
                continue
            path, data = place.kit.folder / name, backup / name
            if write or not path.exists():
                written[path] = data
            elif path.read_bytes() != data.read_bytes():
                other.append(str(path))
        return cls(written, tuple(other))

    def write(self) -> None:
        """Write those that are to be written.

        Raises:
            OSError: the disk refused.
        """
        for path, data in self.written.items():
            private_dir(path.parent)
            write_atomic(path, data.read_bytes())

    def place_after(self, place: Place) -> Place:
        """Return where the server will look for its state once they are written.

        Raises:
            ConfigError: it would refuse them.
        """
        if not self.written:
            return place
        folder = place.kit.folder / LOCAL
        trial = _trial(place)
        shutil.rmtree(trial, ignore_errors=True)
        private_dir(trial / LOCAL)
        try:
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_file():
                    copy_file(path, trial / LOCAL / path.name)
            for path, data in self.written.items():
                copied = trial / path.relative_to(place.kit.folder)
                private_dir(copied.parent)
                copied.unlink(missing_ok=True)
                copy_file(data, copied)
            local = Local.load(trial / LOCAL, "server")
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        override(place.kit.server, local.overrides)
        return replace(place, target=local.resources.state_url or place.folder / LOG)


def _trial(place: Place) -> Path:
    return place.kit.folder / f"{BUILDING}-{LOCAL}"


def in_building(place: Place) -> tuple[Path, ...]:
    """Return what comes to be: the state folder, and the log if that is another SQLite file."""
    parts = (place.folder, place.log_file)
    return tuple(path.with_name(f"{path.name}{BUILDING}") for path in parts if path)


def demand_room(manifest: Manifest, place: Place) -> None:
    """Refuse to begin what cannot end for want of space.

    Raises:
        ResourceExhaustedError: a disk has less free than is to be written to it.
    """
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    log = sizes.pop(LOG)
    state, *files = in_building(place)
    parts = [(state, sum(sizes.values()) + SPARE_BYTES)]
    if sqlite_file(place.target) is not None:
        parts.append((files[0] if files else state, log))
    needed: dict[int, tuple[Path, int]] = {}
    for path, size in parts:
        folder = next(each for each in path.parents if each.is_dir())
        disk = folder.stat().st_dev
        first, so_far = needed.get(disk, (folder, 0))
        needed[disk] = first, so_far + size
    for folder, size in needed.values():
        if (free := shutil.disk_usage(folder).free) < size:
            raise ResourceExhaustedError(
                f"{size} bytes are needed on the disk of {folder}, {free} are free",
                rule="disk",
                hint="make room and try again; nothing was changed",
            )


@contextmanager
def building(place: Place) -> Iterator[ExitStack]:
    """Have everything removed again that comes to be, unless it is put in its place.

    Yields:
        What undoes it, if the block ends with an error.

    Raises:
        ResourceExhaustedError: the machine is short of something.
    """

    def remove() -> None:
        kit = place.kit.folder
        written = (*kit.glob(f".tmp-*-{MARKER}"), *(kit / LOCAL).glob(".tmp-*"))
        for path in (*in_building(place), _trial(place), *written):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    remove()  # what a restore has left that was killed
    try:
        with ExitStack() as undo:
            undo.callback(remove)
            yield undo
            undo.pop_all()
    except OSError as error:
        if (short := shortage_in(error)) is None:
            raise
        raise ResourceExhaustedError(
            f"{short.message}: {error}",
            rule=short.rule,
            hint="nothing was changed: make room and try again",
        ) from error


def build(backup: Path, manifest: Manifest, place: Place, origin: str, damaged: bool) -> Path:
    """Make the state, durable and with the record of the restore in its audit; return its folder.

    Args:
        backup: the backup's folder.
        manifest: of the backup.
        place: where the state goes.
        origin: the id of the backup's log; empty if it carries none.
        damaged: begin a new audit if that of the backup cannot be gone on with.

    Raises:
        DataLossError: something did not arrive as it was, or the audit is damaged.
        OSError: the disk refused.
    """
    built, *files = in_building(place)
    blobs = private_dir(private_dir(built) / BLOBS)
    private_dir(blobs / "incoming")
    copies = {built / _name(name): name for name in manifest.files if _name(name)}
    if sqlite_file(place.target) is not None:
        copies[files[0] if files else built / LOG] = LOG
    for path, name in copies.items():
        private_dir(path.parent)
        copy_file(backup / name, path)
        if path.parent == blobs:
            path.chmod(READ_ONLY_FILE)
    for path, name in copies.items():  # what was read just now may have been damaged on the way
        if digest_of_file(path)[0] != manifest.files[name].digest:
            raise DataLossError(f"{path} is not what was copied", hint="check the disk")
    (built / LOG_ID).unlink(missing_ok=True)  # that of a damaged backup may be another log's
    if origin:
        OwnLog(built, blobs).keep(origin)
    _note(built, place, backup, manifest, damaged)
    for folder, _, _ in os.walk(built):
        fsync_dir(Path(folder))
    for path in files:
        fsync_dir(path.parent)
    return built


def _name(name: str) -> str:
    """Return what a file of a backup is called in the state folder; empty if it has none there."""
    first, _, rest = name.partition("/")
    return name if first == BLOBS else rest if first == STATE else ""


def _note(built: Path, place: Place, backup: Path, manifest: Manifest, damaged: bool) -> None:
    """Write into the audit, which goes on from that of the backup, what happened here."""
    name, details = place.kit.identity.name, {"made": manifest.made, "events": str(manifest.events)}
    try:
        audit = AuditLog(built / AUDIT, name, seal=KitSeal(place.kit))
    except (DataLossError, ValueError, KeyError):
        if not damaged:
            raise
        aside = private_dir(built / f"{DAMAGED_AUDIT}-{datetime.now(UTC).strftime(STAMP)}")
        for path in [*built.glob(f"{AUDIT}*")]:
            path.rename(aside / path.name)
        details["audit of before"] = aside.name
        audit = AuditLog(built / AUDIT, name, seal=KitSeal(place.kit))
    try:
        audit.record(
            {"name": name, "role": "fl_state"},
            "state.restore",
            "allowed",
            target=str(backup),
            details=details,
        )
    finally:
        audit.close()
