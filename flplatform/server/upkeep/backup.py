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
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from flplatform import __version__
from flplatform.core.errors import AlreadyExistsError, DataLossError, InvalidArgumentError
from flplatform.core.strict import Strict
from flplatform.files.digest import demand_digest, digest_of_file
from flplatform.files.durable import (
    PRIVATE_FILE,
    fsync_dir,
    private_dir,
    temporary_beside,
    write_atomic,
)
from flplatform.security.kit import Kit
from flplatform.security.signing import sign
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.place import (
    AUDIT,
    BLOBS,
    LOG,
    READY,
    Place,
    history_of,
    needs_of,
)
from flplatform.store.snapshot import snapshot

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
TAG = "backup"
STATE, LOCAL = "state", "local"
SAME_MISSING = 3
"""How often blobs must be found missing, each time with a newer log, to be lost."""


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
        FLError: the log cannot be read.
        OSError: the disk refused; nothing is left behind.
    """
    target = target.absolute()
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
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _fill(
    place: Place, folder: Path, damaged: bool, link: bool, progress: Callable[[str], None]
) -> Manifest:
    progress("the log, and the blobs that it needs")
    history, files, problems = _copy_log_and_blobs(place, folder, damaged, link)
    progress("the other files of the state, and the kit's local files")
    _copy_audit(place.folder, private_dir(folder / STATE))
    _copy_tree(place.folder, folder / STATE, _wanted)
    _copy_tree(place.kit.folder / "local", private_dir(folder / LOCAL), lambda _path: True)
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
        problems=tuple(problems),
    )


def _copy_log_and_blobs(
    place: Place, folder: Path, damaged: bool, link: bool
) -> tuple[History, dict[str, Entry], list[str]]:
    """Take the log first, then its blobs; a newer log if a server has freed one meanwhile."""
    log, blobs = folder / LOG, private_dir(folder / BLOBS)
    times: dict[str, int] = {}
    while True:
        log.unlink(missing_ok=True)
        with place.snapshot() as now:
            now.copy(log)
        with snapshot(log) as copied:
            history = history_of(copied)
        problems = [str(finding) for finding in history.findings if finding.problem]
        needs = needs_of(history)
        missing = {digest for digest in needs if not _take(place, digest, blobs, link)}
        times = {digest: times.get(digest, 0) + 1 for digest in missing}
        if not missing or min(times.values()) >= SAME_MISSING:
            break
    problems += [
        f"blob {digest} is missing, run {needs[digest].by} needs it" for digest in sorted(missing)
    ]
    if problems and not damaged:
        raise DataLossError(
            f"the state has {len(problems)} problems, the first: {problems[0]}",
            hint="fl_state verify names all; --damaged copies what is left",
        )
    files: dict[str, Entry] = {}
    for path in _files(blobs):
        digest = f"blake3:{path.name}"
        if digest not in needs:
            path.unlink()
            continue
        try:
            demand_digest(path, digest)
        except DataLossError as error:
            if not damaged:
                raise
            problems.append(error.message)
            path.unlink()
            continue
        files[f"{BLOBS}/{path.name}"] = Entry(digest=digest, size=path.stat().st_size)
    return history, files, problems


def _take(place: Place, digest: str, folder: Path, link: bool) -> bool:
    """Link or copy a blob; return whether it is there."""
    source = place.blobs.file(digest)
    target = folder / source.name
    if target.exists():
        return True
    try:
        if not (link and _link(source, target)):
            copy_file(source, target)
    except FileNotFoundError:
        return False
    return True


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        return False
    return True


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, durable on return, for this user alone.

    Args:
        source: an existing file.
        target: must not exist.

    Raises:
        OSError: it cannot be read or written; nothing is left behind.
    """
    with source.open("rb") as reader:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.open(target, flags, PRIVATE_FILE)
        try:
            with os.fdopen(handle, "wb") as writer:
                shutil.copyfileobj(reader, writer, 4 << 20)
                writer.flush()
                os.fsync(writer.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise


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


def _copy_tree(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    for path in _files(source):
        relative = path.relative_to(source)
        if wanted(relative):
            private_dir(target / relative.parent)
            with suppress(FileNotFoundError):  # a running server removes some
                copy_file(path, target / relative)


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
