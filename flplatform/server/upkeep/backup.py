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
from contextlib import suppress
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
    UnavailableError,
)
from flplatform.core.strict import Strict
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import (
    fsync_dir,
    private_dir,
    temporary_beside,
    write_atomic,
)
from flplatform.security.kit import Kit
from flplatform.security.signing import sign
from flplatform.server.upkeep.files import check_files
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.place import (
    AUDIT,
    BLOBS,
    LOG,
    LOOKS,
    READY,
    Place,
    history_of,
    needs_of,
)
from flplatform.server.upkeep.taking import TakenBlobs, copy_file, why_unreadable
from flplatform.server.upkeep.unfinished import unfinished_in
from flplatform.server.upkeep.verify import check_emptiness, verify_state
from flplatform.store.snapshot import snapshot

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
TAG = "backup"
STATE, LOCAL = "state", "local"
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
        InvalidArgumentError: it lies in the state itself.
        DataLossError: the state has problems.
        UnavailableError: a server at work frees blobs faster than they can be taken.
        FailedPreconditionError: a restore of it did not end.
        FLError: the log cannot be read.
        OSError: the disk refused; nothing is left behind.
    """
    target = target.absolute()
    if found := unfinished_in(place.kit.folder):
        raise FailedPreconditionError(found.told(place.kit.folder))
    if target.exists():
        raise AlreadyExistsError(f"{target} exists", hint="name a folder that does not")
    if target.resolve().is_relative_to(place.folder.resolve()):
        raise InvalidArgumentError(f"{target} lies in the state that it is to be a copy of")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = private_dir(temporary_beside(target))
    try:
        manifest = _fill(place, temporary, damaged, link, progress)
        _seal(place.kit, temporary, manifest)
        os.rename(temporary, target)
        fsync_dir(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _rename_in(error, temporary, target)
        raise
    return manifest


def _rename_in(error: BaseException, temporary: Path, target: Path) -> None:
    """Have an error name the folder that was asked for, not the one that has gone."""
    if isinstance(error, FLError):
        error.message = error.message.replace(str(temporary), str(target))
    elif isinstance(error, OSError) and isinstance(error.filename, str):
        error.filename = error.filename.replace(str(temporary), str(target))


def _fill(
    place: Place, folder: Path, damaged: bool, link: bool, progress: Callable[[str], None]
) -> Manifest:
    problems = _Problems(folder, damaged)
    problems.add(each.what for each in check_files(place) if each.problem)
    progress("the log, and the blobs that it needs")
    taken = TakenBlobs(place.blobs, private_dir(folder / BLOBS), link, progress)
    history = _take_log_and_blobs(place, folder, taken, progress)
    problems.add(each.what for each in history.findings if each.problem)
    problems.add(each.what for each in check_emptiness(place, history))
    files = dict(_checked(taken, problems))
    progress("the other files of the state, and the kit's local files")
    _copy_audit(place.folder, private_dir(folder / STATE))
    problems.add(_copy_tree(place.folder, folder / STATE, _wanted))
    problems.add(
        _copy_tree(place.kit.folder / "local", private_dir(folder / LOCAL), lambda _path: True)
    )
    progress("checking what was taken")
    problems.add(
        each.what
        for each in verify_state(Place.of_backup(folder, place.kit)).problems
        if each.where.removeprefix("blob ") not in taken.unreadable
    )
    for root in (STATE, LOCAL):
        files |= {str(path.relative_to(folder)): _entry(path) for path in _files(folder / root)}
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

    def add(self, texts: Iterable[str]) -> None:
        """Note problems.

        Raises:
            DataLossError: there are some, and a damaged state is not to be backed up.
        """
        for text in texts:
            if (shown := text.replace(f"{self._folder}/", "")) not in self.texts:
                self.texts.append(shown)
        if self.texts and not self._damaged:
            count = len(self.texts)
            raise DataLossError(
                f"the state has {count} problem{'s' if count > 1 else ''}, the first: "
                + self.texts[0],
                hint="fl_state verify --deep names all; --damaged copies what is left",
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
        with snapshot(log) as copied:
            history = history_of(copied)
        needs = needs_of(history)
        taken.take(needs)
        again = taken.drop_all_but(needs)
        if not taken.links:
            unwanted |= again & dropped
            dropped |= again
        missing = needs.keys() - taken.here
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


def _copy_audit(source: Path, target: Path) -> None:
    """Copy the audit: what says how long it is goes first, so that the copy is never too short.

    A record that is just being written is left out; if the file was filled meanwhile, again.
    """
    ends = (f"{AUDIT}.head", f"{AUDIT}.checkpoint")
    while True:
        before = sorted(path.name for path in source.glob(f"{AUDIT}.0*"))
        for name in (*ends, *before, AUDIT):
            (target / name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                copy_file(source / name, target / name)
        if before == sorted(path.name for path in source.glob(f"{AUDIT}.0*")):
            break
    current = target / AUDIT
    if current.exists():
        data = current.read_bytes()
        os.truncate(current, data.rfind(b"\n") + 1)
    for path in source.glob(f"{AUDIT}.torn-*"):
        copy_file(path, target / path.name)


def _wanted(path: Path) -> bool:
    """Return whether a file of the state folder is copied as it is; `path` is relative to it."""
    first = path.parts[0]
    return not (
        first in (BLOBS, READY)
        or first.startswith((LOG, AUDIT))
        or path.name.endswith(".lock")
        or any(part.startswith(".tmp-") for part in path.parts)
    )


def _copy_tree(source: Path, target: Path, wanted: Callable[[Path], bool]) -> Iterator[str]:
    """Copy files; yield what is wrong with those that cannot be read."""
    for path in _files(source):
        relative = path.relative_to(source)
        if wanted(relative):
            private_dir(target / relative.parent)
            try:
                copy_file(path, target / relative)
            except FileNotFoundError:  # a running server removes some
                continue
            except OSError as error:
                yield f"{source.name}/{relative} {why_unreadable(error)}"


def _files(root: Path) -> Iterator[Path]:
    """Yield the plain files below a folder."""
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                yield path


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
