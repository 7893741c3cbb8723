"""`fl_state restore`: a backup becomes a state again, or nothing is changed."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
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
from flplatform.files.durable import fsync_dir, replace_durably, why_no_folder
from flplatform.files.lock import held
from flplatform.security.kit import Kit
from flplatform.security.signing import Signed, check_signature
from flplatform.server.upkeep.asides import SQLITE_ENDS, Asides
from flplatform.server.upkeep.backup import MANIFEST, SIGNATURE, TAG, Manifest
from flplatform.server.upkeep.building import (
    STAMP,
    LocalFiles,
    build,
    building,
    demand_room,
    in_building,
)
from flplatform.server.upkeep.demands import (
    demand_possible,
    is_there,
    log_held,
    streams_of,
)
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.log_id import OwnLog
from flplatform.server.upkeep.place import BLOBS, LOG, Place, contents, history_of, needs_of
from flplatform.server.upkeep.unfinished import Unfinished, unfinished_in
from flplatform.server.wording import count
from flplatform.store.snapshot import open_store, snapshot, sqlite_file


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done.

    Attributes:
        log: what messages call the event log, where the server looks for it now.
        aside: where the former state lies now, if there was one.
        log_aside: the same of a log that lay outside of it.
        half: where that lies which restores that did not end had made, if they had.
        other_local: local files of the kit that differ from the backup's and stayed.
        took_url: whether `log` is there because of the backup's local files.
        unended: numbers of the runs that go on, for they had not ended.
    """

    manifest: Manifest
    log: str
    aside: Path | None
    log_aside: Path | None
    half: tuple[Path, ...]
    other_local: tuple[str, ...]
    took_url: bool
    unended: tuple[int, ...]


def read_backup(folder: Path, kit: Kit) -> Manifest:
    """Verify a backup whole: its signature, every file, and that its log finds its blobs.

    Raises:
        FLError: it is no backup, not one of this server, or damaged; names the file.
        OSError: it cannot be read.
    """
    return _read_backup(folder, kit)[0]


def _read_backup(folder: Path, kit: Kit) -> tuple[Manifest, History, str]:
    """Return what `read_backup` does, what its log tells, and the id of that log."""
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
        history, origin = history_of(log), log.origin
    needs = needs_of(history)
    names = {f"{BLOBS}/{digest.partition(':')[2]}" for digest in needs}
    if (missing := names - manifest.files.keys()) and not manifest.problems:
        raise DataLossError(f"{folder} lacks {len(missing)} blobs, such as {min(missing)}")
    return manifest, history, origin


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

    From the first change to the last the kit is marked: no server starts on it, and a restore that
    did not end is ended by another one, of the same backup or of another, which moves aside
    whatever it finds.

    Args:
        backup: its folder.
        place: where the state goes; no server may run. If the backup's local files name another
            log they win, for the server will read them: see `LocalFiles`.
        move_aside: rename a state that is there, instead of refusing.
        with_local: write the backup's local files over the kit's.
        damaged: accept the backup of a state that had problems.
        progress: told of each step.

    Raises:
        FailedPreconditionError: a server runs, or there is a state already.
        ResourceExhaustedError: there is no room for it; nothing was changed.
        FLError: the backup is not whole, or of another server.
        OSError: the disk refused.
    """
    with ExitStack() as locks:
        locks.enter_context(held(place.lock, f"the kit {place.kit.folder}"))
        if place.folder.exists() and not place.folder.is_dir():
            raise FailedPreconditionError(why_no_folder(place.folder), hint="move it away")
        if place.opened:
            raise FailedPreconditionError(
                f"a server has the state {place.folder} open", hint="stop it first"
            )
        progress("verifying the backup")
        manifest, history, origin = _read_backup(backup, place.kit)
        if manifest.problems and not damaged:
            raise FailedPreconditionError(
                f"{backup} holds a state that had {count(len(manifest.problems), 'problem')}, "
                f"the first: {manifest.problems[0]}",
                hint="--damaged restores what there is",
            )
        local = LocalFiles.of(backup, manifest, place, with_local)
        after = local.place_after(place)
        took_url, place = after.target != place.target, after.resolved()
        locks.enter_context(log_held(place))
        before = unfinished_in(place.kit.folder)
        demand_possible(backup, place, before, move_aside)
        with building(place) as undo:
            demand_room(manifest, place)
            progress("copying blobs and files")
            built = build(backup, manifest, place, origin, damaged)
            progress("putting the state in its place")
            mark = _marked(backup, place, before, with_local=with_local, damaged=damaged)
            asides = Asides(mark, datetime.now(UTC).strftime(STAMP))
            if before is None:
                undo.callback(_unmark, place, asides)
            _swap(place, built, asides, undo)
        fsync_dir(place.folder.parent)
        local.write()
        OwnLog.of(place).note(origin)
        _fill_log(backup, place, asides, origin)
        name = _demand_restored(backup, place)
        Unfinished.end(place.kit.folder)
        log_file = place.log_file
        return Restored(
            manifest,
            name,
            asides.before(place.folder),
            asides.before(log_file) if log_file else None,
            tuple(asides.half),
            local.other,
            took_url,
            _unended(history),
        )


def _unended(history: History) -> tuple[int, ...]:
    """Return the numbers of the runs that go on."""
    return tuple(
        number
        for number, run in sorted(history.runs.items())
        if number not in history.deleted and run.state is not None and run.state.ended is None
    )


def _marked(
    backup: Path, place: Place, before: Unfinished | None, *, with_local: bool, damaged: bool
) -> Unfinished:
    """Mark the kit; what is known of a restore that did not end stays known."""
    log_file = place.log_file
    chosen = (("--with-local", with_local), ("--damaged", damaged))
    mark = Unfinished(
        backup=str(backup.absolute()),
        options=tuple(option for option, wanted in chosen if wanted),
        stamp=before.stamp if before else datetime.now(UTC).strftime(STAMP),
        had_state=before.had_state if before else any(contents(place.folder)),
        had_log=before.had_log if before else log_file is not None and is_there(log_file),
    )
    mark.begin(place.kit.folder)
    return mark


def _unmark(place: Place, asides: Asides) -> None:
    """Take the mark off a kit that is as it was; one that could not be put back keeps it."""
    if asides.before(place.folder) is None:
        Unfinished.end(place.kit.folder)


def _swap(place: Place, built: Path, asides: Asides, undo: ExitStack) -> None:
    """Rename what is there away and the new state into its place."""
    if any(contents(place.folder)):
        former = asides.move(place.folder, was_there=asides.mark.had_state)
        undo.callback(os.rename, former, place.folder)
    elif place.folder.exists():
        shutil.rmtree(place.folder)
    os.rename(built, place.folder)


def _fill_log(backup: Path, place: Place, asides: Asides, origin: str) -> None:
    """Put the log where the kit keeps it: last, so that every blob it names is there."""
    if path := place.log_file:
        new = in_building(place)[1]
        if is_there(path):
            asides.move(path, SQLITE_ENDS, was_there=asides.mark.had_log)
        replace_durably(new, path)
    if sqlite_file(place.target):
        return
    with snapshot(backup / LOG) as log:
        rows = [row for stream in log.streams() for row in log.read(stream)]
    with closing(open_store(place.target, origin)) as store:
        if not store.streams():
            store.append(rows).result()


def _demand_restored(backup: Path, place: Place) -> str:
    """Read the log again where the server will look for it; return what messages call it.

    Raises:
        DataLossError: it is not the backup's there.
        ConfigError: it is not that of the state folder.
    """
    place = Place.of(place.kit.folder)
    name, found = streams_of(place.target)
    if found != streams_of(backup / LOG)[1]:
        raise DataLossError(
            f"{name} does not hold the events of {backup}", hint="did a server start meanwhile?"
        )
    with place.snapshot() as log:
        OwnLog.of(place).demand(name, log.origin, not found)
    return name
