"""`fl_state backup`: a consistent copy of a state, also of a running one.

    events.db        the log, as one SQLite file wherever the server keeps it
    blobs/           what this log needs
    state/           the other files of the state folder, the audit among them
    local/           the kit's local files
    manifest.json    digests of all of it, signed with the server's key: manifest.sig

Whatever is not ready has another name: a folder without a manifest is no backup. Keys are not in
it: the kit itself is kept by who provisioned it.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from flplatform import __version__
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.strict import Strict
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import (
    fsync_dir,
    private_dir,
    write_atomic,
)
from flplatform.files.shortage import shortage_in
from flplatform.security.kit import Kit
from flplatform.security.signing import sign
from flplatform.server.upkeep.becoming import becoming, remove_left
from flplatform.server.upkeep.files import check_files
from flplatform.server.upkeep.findings import Finding
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.log_id import OwnLog
from flplatform.server.upkeep.place import (
    BLOBS,
    LOG,
    LOOKS,
    Place,
    history_of,
    needs_of,
)
from flplatform.server.upkeep.small_files import copy_audit, copy_local, copy_state, files_in
from flplatform.server.upkeep.taking import TakenBlobs, why_unreadable
from flplatform.server.upkeep.unfinished import told_of
from flplatform.server.upkeep.verify import check_emptiness, check_log_head, verify_state
from flplatform.store.snapshot import snapshot

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
TAG = "backup"
STATE, LOCAL = "state", "local"
_NAMES = (STATE, LOCAL, LOG, f"{LOG}-journal", MANIFEST, SIGNATURE)
"""What is in an unfinished backup beside its blobs."""
MOST_LOGS = 10
"""How many logs are taken until one has all its blobs."""


class Entry(Strict):
    """A file of a backup."""

    digest: str
    size: int


class Manifest(Strict):
    """`manifest.json`.

    Attributes:
        made: UTC, ISO 8601.
        release: of the tool.
        files: path in the backup -> digest and size; the blobs too.
        problems: what was wrong with the state, if it was backed up all the same.
    """

    version: Literal[1] = 1
    project: str
    name: str
    made: str
    release: str
    runs: int
    events: int
    files: dict[str, Entry]
    problems: tuple[str, ...] = ()


def back_up(
    place: Place,
    target: Path,
    *,
    damaged: bool = False,
    link: bool = True,
    progress: Callable[[str], None] = lambda _text: None,
) -> Manifest:
    """Copy a state into a new folder.

    Args:
        place: the state; a server may run.
        target: the backup's folder; it must not exist yet.
        damaged: copy what is left of a state with problems too.
        link: take blobs by hard link where the file system can: they are never written again.
        progress: told of each step.

    Raises:
        AlreadyExistsError: the target exists.
        InvalidArgumentError: it lies in what is copied, or in the server's logs.
        DataLossError: the state has problems.
        UnavailableError: a server at work frees blobs faster than they can be taken.
        FailedPreconditionError: a restore of it did not end.
        ConfigError: the state folder is lost.
        FLError: the log cannot be read.
        ResourceExhaustedError: the disk is full; nothing is left behind.
        OSError: the disk refused; nothing is left behind.
    """
    target = target.absolute()
    if told := told_of(place.kit.folder):
        raise FailedPreconditionError(told)
    if place.holds_log:
        OwnLog.of(place).demand_state()
    if os.path.lexists(target):
        raise AlreadyExistsError(f"{target} exists", hint="name a folder that does not")
    for folder in (*place.roots, place.kit.folder / "local"):
        if target.resolve().is_relative_to(folder.resolve()):
            raise InvalidArgumentError(
                f"{target} lies in {folder}", hint="name a folder outside of what is backed up"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in remove_left(target.parent, BLOBS, _NAMES):
        progress(f"removed {left}, which a backup that was killed had left")
    try:
        with becoming(target) as temporary:
            try:
                manifest = _fill(place, temporary, damaged, link, progress)
                _seal(place.kit, temporary, manifest)
            except BaseException as error:
                _rename_in(error, temporary, target)
                raise
    except (FLError, OSError) as error:
        short = shortage_in(error)
        if short is None or short.rule != "disk":
            raise
        free = shutil.disk_usage(target.parent).free
        raise ResourceExhaustedError(
            f"there is no room for the backup: {free} bytes are free on the disk of "
            f"{target.parent} ({error})",
            rule="disk",
            hint="make room there, or name a TARGET on another disk; nothing is left of this one",
        ) from error
    return manifest


def _rename_in(error: BaseException, temporary: Path, target: Path) -> None:
    """Have an error name the folder that was asked for, not the one that has gone."""
    if isinstance(error, FLError):
        error.message = error.message.replace(str(temporary), str(target))
        error.hint = error.hint.replace(str(temporary), str(target))
    elif isinstance(error, OSError) and isinstance(error.filename, str):
        error.filename = error.filename.replace(str(temporary), str(target))


def _fill(
    place: Place, folder: Path, damaged: bool, link: bool, progress: Callable[[str], None]
) -> Manifest:
    problems = _Problems(folder, damaged)
    problems.add(check_files(place, logs=False))
    progress("the log, and the blobs that it needs")
    taken = TakenBlobs(place.blobs, private_dir(folder / BLOBS), link, progress)
    history = _take_log_and_blobs(place, folder, taken, progress)
    problems.add(history.findings)
    problems.add(check_emptiness(place, history))
    problems.add(check_log_head(place))
    files = dict(_checked(taken, problems))
    progress("the other files of the state, and the kit's local files")
    problems.add(copy_audit(place.folder, private_dir(folder / STATE)))
    problems.add(copy_state(place.folder, folder / STATE))
    problems.add(copy_local(place.kit.folder / "local", private_dir(folder / LOCAL)))
    progress("checking what was taken")
    problems.add(
        each
        for each in verify_state(Place.of_backup(folder, place.kit)).problems
        if each.where.removeprefix("blob ") not in taken.unreadable
    )
    for root in (STATE, LOCAL):
        files |= {
            str(path.relative_to(folder)): _entry(path) for path in files_in(folder / root, _demand)
        }
    files[LOG] = _entry(folder / LOG)
    identity = place.kit.identity
    return Manifest(
        project=identity.project,
        name=identity.name,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        release=__version__,
        runs=len(history.runs),
        events=history.count,
        files=dict(sorted(files.items())),
        problems=tuple(problems.texts),
    )


class _Problems:
    """What is wrong with a state that is being backed up.

    Args:
        folder: the unfinished backup; no text names it.
        damaged: collect them; else the first ones end the backup.
    """

    def __init__(self, folder: Path, damaged: bool) -> None:
        self.texts: list[str] = []
        self._folder = folder
        self._damaged = damaged

    def add(self, found: Iterable[Finding | str]) -> None:
        """Note problems.

        Args:
            found: what a check says, or only what is wrong; what is no problem is left out.

        Raises:
            DataLossError: there are some, and a damaged state is not to be backed up.
        """
        advice = ""
        for each in found:
            if isinstance(each, Finding) and not each.problem:
                continue
            text = each if isinstance(each, str) else each.what
            if not self.texts and isinstance(each, Finding):
                advice = f"{each.advice}; "
            if (shown := text.replace(f"{self._folder}/", "")) not in self.texts:
                self.texts.append(shown)
        if self.texts and not self._damaged:
            count = len(self.texts)
            raise DataLossError(
                f"the state has {count} problem{'s' if count > 1 else ''}, the first: "
                + self.texts[0],
                hint=f"{advice}fl_state verify --deep names all; --damaged copies what is left",
            )


def _take_log_and_blobs(
    place: Place, folder: Path, taken: TakenBlobs, progress: Callable[[str], None]
) -> History:
    """Take the log and what it needs; a newer log if a server has freed some of it meanwhile.

    The blobs are taken right before and right after the log, before the log is read: a run with
    short rounds frees what it needed a moment ago. What was taken and is not needed goes again.

    Raises:
        UnavailableError: the server was always faster.
    """
    log, times = folder / LOG, dict[str, int]()
    unwanted: set[str] = set()
    dropped: set[str] = set()
    if not taken.links:  # what nobody needs takes time and room
        before = place.blobs.digests()
        unwanted = set(before) - needs_of(place.history()).keys()
    for _ in range(MOST_LOGS):
        taken.take(set(place.blobs.digests()) - unwanted)
        log.unlink(missing_ok=True)
        with place.snapshot() as now:
            now.copy(log)
        taken.take(set(place.blobs.digests()) - unwanted)
        try:
            with snapshot(log) as copied:
                history = history_of(copied)
        except DataLossError as error:  # what is damaged is what was copied
            error.message = error.message.replace(str(log), now.name)
            raise
        needs = needs_of(history)
        taken.take(needs)
        again = taken.drop_all_but(needs)
        if not taken.links:
            unwanted |= again & dropped
            dropped |= again
        missing = needs.keys() - taken.here - taken.unreadable.keys()
        times = {digest: times.get(digest, 0) + 1 for digest in missing}
        if all(count >= LOOKS for count in times.values()):
            return history
        count = f"{len(missing)} blob{'s' if len(missing) > 1 else ''}"
        progress(f"{count} not there, perhaps freed meanwhile: a newer log")
    runs = sorted({run for digest in missing for run in needs[digest].runs})
    raise UnavailableError(
        f"{MOST_LOGS} times the server freed blobs faster than they could be taken, those of run "
        + ", ".join(map(str, runs)),
        hint="try again when that has ended, or stop the server meanwhile",
    )


def _checked(taken: TakenBlobs, problems: _Problems) -> Iterator[tuple[str, Entry]]:
    """Read what was taken, drop what is damaged, yield the rest by its name in the backup."""
    for digest in sorted(taken.here):
        path = taken.file(digest)
        try:
            found, size = digest_of_file(path)
            why = "" if found == digest else f"is damaged: its {size} bytes have digest {found}"
        except OSError as error:
            why = why_unreadable(error)
        if why:
            taken.unreadable[digest] = why
            taken.drop(digest)
        else:
            yield f"{BLOBS}/{path.name}", Entry(digest=digest, size=size)
    problems.add(f"blob {digest} {why}" for digest, why in sorted(taken.unreadable.items()))


def _demand(error: OSError) -> None:
    raise error


def _entry(path: Path) -> Entry:
    digest, size = digest_of_file(path)
    return Entry(digest=digest, size=size)


def _seal(kit: Kit, folder: Path, manifest: Manifest) -> None:
    """Write the signed manifest, when everything else is durable."""
    for parent, _, _ in os.walk(folder):
        fsync_dir(Path(parent))
    payload = manifest.model_dump_json(indent=1).encode()
    signed = sign(TAG, payload, kit.private_key(), kit.chain)
    write_atomic(folder / SIGNATURE, signed.to_detached())
    write_atomic(folder / MANIFEST, payload)
