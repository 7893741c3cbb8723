"""`fl_state restore`: a backup becomes a state again, or nothing is changed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    UnauthenticatedError,
)
from flplatform.core.strict import parse_json
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import READ_ONLY_FILE, fsync_dir, private_dir, write_atomic
from flplatform.files.lock import held
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.security.kit import Kit
from flplatform.security.signing import Signed, check_signature
from flplatform.server.upkeep.backup import (
    LOCAL,
    MANIFEST,
    SIGNATURE,
    STATE,
    TAG,
    Manifest,
    copy_file,
)
from flplatform.server.upkeep.place import AUDIT, BLOBS, LOG, READY, Place, history_of, needs_of
from flplatform.store.snapshot import snapshot, sqlite_file
from flplatform.store.state import SqlStateStore

BUILDING = ".restoring"
"""Folder in the kit in which the state comes to be; what a restore that did not end has left."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done.

    Attributes:
        aside: where the former state lies now, if there was one.
        other_local: local files of the kit that differ from the backup's and stayed.
    """

    manifest: Manifest
    aside: Path | None
    other_local: tuple[str, ...]


def read_backup(folder: Path, kit: Kit) -> Manifest:
    """Verify a backup whole: its signature, every file, and that its log finds its blobs.

    Raises:
        FLError: it is no backup, not one of this server, or damaged; names the file.
        OSError: it cannot be read.
    """
    try:
        payload = (folder / MANIFEST).read_bytes()
        signature = (folder / SIGNATURE).read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"{folder} is no backup: it has no {MANIFEST} with its signature",
            hint="one that was not finished is worth nothing",
        ) from None
    _check_signer(folder, Signed.from_detached(payload, signature), kit)
    manifest = parse_json(Manifest, payload, str(folder / MANIFEST))
    if (manifest.project, manifest.name) != (kit.identity.project, kit.identity.name):
        raise ConfigError(
            f"{folder} is a backup of {manifest.name} of project {manifest.project}, "
            f"this is the kit of {kit.identity.name} of {kit.identity.project}"
        )
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
            raise DataLossError(f"{path} does not lie in the backup")
        if not path.is_file():
            raise DataLossError(f"{path} is missing", hint="take another backup")
        if digest_of_file(path) != (entry.digest, entry.size):
            raise DataLossError(f"{path} was changed or damaged", hint="take another backup")
    with snapshot(folder / LOG) as log:
        needs = needs_of(history_of(log))
    names = {f"{BLOBS}/{digest.partition(':')[2]}" for digest in needs}
    if (missing := names - manifest.files.keys()) and not manifest.problems:
        raise DataLossError(f"{folder} lacks {len(missing)} blobs, such as {min(missing)}")
    return manifest


def _check_signer(folder: Path, signed: Signed, kit: Kit) -> None:
    certificate = check_signature(TAG, signed)
    issued = certificate.not_valid_before_utc  # it may have expired since
    signer = kit.trust.verify_chain(certificate, kit.identity.kind, issued)
    if signer.uri != kit.identity.uri:
        raise UnauthenticatedError(f"{folder} is signed by {signer.uri}, not by {kit.identity.uri}")


def restore(
    backup: Path,
    place: Place,
    *,
    move_aside: bool = False,
    with_local: bool = False,
    damaged: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
) -> Restored:
    """Make a state of a backup; until its last steps nothing of the kit is changed.

    Args:
        backup: its folder.
        place: where the state goes; no server may run.
        move_aside: rename a state that is there, instead of refusing.
        with_local: write the backup's local files over the kit's.
        damaged: accept the backup of a state that had problems.
        progress: told of each step.

    Raises:
        FailedPreconditionError: a server runs, or there is a state already.
        FLError: the backup is not whole, or of another server.
        OSError: the disk refused.
    """
    with held(place.lock, f"the kit {place.kit.folder}"):
        if place.opened:
            raise FailedPreconditionError(
                f"a server has the state {place.folder} open", hint="stop it first"
            )
        progress("verifying the backup")
        manifest = read_backup(backup, place.kit)
        if manifest.problems and not damaged:
            raise FailedPreconditionError(
                f"{backup} holds a state that had {len(manifest.problems)} problems, the first: "
                + manifest.problems[0],
                hint="--damaged restores what there is",
            )
        _demand_room(place, move_aside)
        progress("copying blobs and files")
        built = _build(backup, manifest, place)
        inside = sqlite_file(place.target) == place.folder / LOG
        if inside:
            copy_file(backup / LOG, built / LOG)
        for folder, _, _ in os.walk(built):
            fsync_dir(Path(folder))
        progress("putting the state in its place")
        aside = _swap(place, built)
        if not inside:
            _fill_log(backup, place)
        other = tuple(_local(backup, manifest, place.kit, with_local))
        _note(place, backup, manifest)
        return Restored(manifest, aside, other)


def _demand_room(place: Place, move_aside: bool) -> None:
    """Refuse to put a state where one is."""
    hint = "--move-aside renames it; nothing is ever overwritten"
    if not move_aside and any(_contents(place.folder)):
        raise FailedPreconditionError(f"there is a state in {place.folder}", hint=hint)
    path = sqlite_file(place.target)
    if path == place.folder / LOG:
        return
    if path is not None:
        if path.exists() and not move_aside:
            raise FailedPreconditionError(f"there is an event log {path}", hint=hint)
        return
    try:
        with place.snapshot() as log:
            streams = log.streams()
    except NotFoundError:
        return
    if streams:
        raise FailedPreconditionError(
            f"{log.name} holds the events of {len(streams)} streams",
            hint="name an empty database or schema in state_url",
        )


def _contents(folder: Path) -> Iterator[Path]:
    """Yield what makes a folder a state; a server that never started leaves nothing of it."""
    if folder.is_dir():
        for path in folder.rglob("*"):
            if not path.is_dir() and not path.name.endswith(".lock") and path.name != READY:
                yield path


def _build(backup: Path, manifest: Manifest, place: Place) -> Path:
    built = place.folder.with_name(BUILDING)
    shutil.rmtree(built, ignore_errors=True)
    private_dir(built)
    blobs = private_dir(built / BLOBS)
    private_dir(blobs / "incoming")
    for name in manifest.files:
        if name.startswith(f"{BLOBS}/"):
            copy_file(backup / name, built / name)
            (built / name).chmod(READ_ONLY_FILE)
        elif name.startswith(f"{STATE}/"):
            path = built / name.removeprefix(f"{STATE}/")
            private_dir(path.parent)
            copy_file(backup / name, path)
    for path in _contents(built):  # what was read just now may have been damaged on the way
        relative = path.relative_to(built)
        name = str(relative) if relative.parts[0] == BLOBS else f"{STATE}/{relative}"
        if digest_of_file(path)[0] != manifest.files[name].digest:
            raise DataLossError(f"{path} is not what was copied", hint="check the disk")
    return built


def _swap(place: Place, built: Path) -> Path | None:
    """Rename the former state away and the new one into its place."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside: Path | None = None
    if any(_contents(place.folder)):
        aside = place.folder.with_name(f"{place.folder.name}.before-{stamp}")
        os.rename(place.folder, aside)
    elif place.folder.exists():
        shutil.rmtree(place.folder)
    os.rename(built, place.folder)
    fsync_dir(place.folder.parent)
    path = sqlite_file(place.target)
    if path is not None and path != place.folder / LOG:
        for part in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            if part.exists():
                os.rename(part, f"{part}.before-{stamp}")
    return aside


def _fill_log(backup: Path, place: Place) -> None:
    """Put the log where the kit keeps it: last, so that every blob it names is there."""
    path = sqlite_file(place.target)
    if path is not None:
        private_dir(path.parent)
        copy_file(backup / LOG, path)
        fsync_dir(path.parent)
        return
    with snapshot(backup / LOG) as log:
        rows = [row for stream in log.streams() for row in log.read(stream)]
    failures: list[BaseException] = []
    with closing(SqlStateStore(place.target, failures.append)) as store:
        store.append(rows).result()


def _local(backup: Path, manifest: Manifest, kit: Kit, write: bool) -> Iterator[str]:
    """Put back local files that the kit lacks, or all; yield those that differ and stay."""
    for name in manifest.files:
        if not name.startswith(f"{LOCAL}/"):
            continue
        path, data = kit.folder / "local" / name.removeprefix(f"{LOCAL}/"), backup / name
        if path.exists() and not write:
            if path.read_bytes() != data.read_bytes():
                yield str(path)
            continue
        private_dir(path.parent)
        write_atomic(path, data.read_bytes())


def _note(place: Place, backup: Path, manifest: Manifest) -> None:
    """Write into the audit, which goes on from that of the backup, what happened here."""
    audit = AuditLog(place.folder / AUDIT, place.kit.identity.name, seal=KitSeal(place.kit))
    try:
        audit.record(
            {"name": place.kit.identity.name, "role": "fl_state"},
            "state.restore",
            "allowed",
            target=str(backup),
            details={"made": manifest.made, "events": str(manifest.events)},
        )
    finally:
        audit.close()
