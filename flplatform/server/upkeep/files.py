"""The checks of files: blobs, rights, temporary files, small files, the audit."""

import errno
import json
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from flplatform.core.errors import DataLossError, FLError, ModelFormatError
from flplatform.core.model import is_digest
from flplatform.files.digest import demand_digest
from flplatform.files.modelfile import read_layout
from flplatform.security.audit import Head, KitSeal, records, verify
from flplatform.security.audit_files import unfinished_bytes
from flplatform.server.aggregation import FROM_BACKUP
from flplatform.server.upkeep.asides import SQLITE_ENDS
from flplatform.server.upkeep.findings import RESTORE, Finding, note
from flplatform.server.upkeep.place import AUDIT, BLOBS, BlobFolder, Need, Place
from flplatform.store.blobs import KEEP_PARTS_S
from flplatform.store.snapshot import sqlite_file

BLOB_MISSING = "blob is there"
BLOB_READ = "I5 blob"
BLOB_SIZE = "I5 blob size"
BLOB_DIGEST = "I5 blob digest"
BLOB_MODEL = "I5 model file"
UNREFERENCED = "unreferenced blob"
FOREIGN = "foreign file"
PARTIAL = "partial upload"
WHOLE_FILE = "I5 whole file"
TEMPORARY = "temporary file"
RIGHTS = "rights"
AUDIT_CHAIN = "I7 audit chain"

_LOGGED = ("begin", "stage", "submit", "validate_begin")
"""Commands whose effect is in the log."""
_JSON_FILES = ("users.json", "sites.json", "login_attempts.json")
INCOMING = "incoming"
_PUBLIC_IN_PRIVATE = 0o444


def check_blobs(
    blobs: BlobFolder, needs: Mapping[str, Need], deep: bool
) -> tuple[list[Finding], set[str]]:
    """Check that what is needed is whole, and what it should be; return what is missing, too.

    Args:
        blobs: the folder.
        needs: what the log needs.
        deep: compute every digest, and read the header of every model.
    """
    if blobs.root.exists() and not blobs.root.is_dir():
        text = f"it is no folder, and the log needs {len(needs)} blobs"
        return [Finding(f"state/{BLOBS}", BLOB_MISSING, text, RESTORE)], set()
    if blobs.root.is_dir() and not os.access(blobs.root, os.R_OK | os.X_OK):
        return [], set()  # said with the rights
    findings: list[Finding] = []
    missing: set[str] = set()
    for digest, need in sorted(needs.items()):
        try:
            findings += _check_blob(blobs.file(digest), digest, need, deep)
        except FileNotFoundError:
            missing.add(digest)
        except OSError as error:
            text = f"it cannot be read: {error.strerror}; {need.who}"
            findings.append(Finding(f"blob {digest}", BLOB_READ, text, FROM_BACKUP))
    return findings, missing


def check_digests(blobs: BlobFolder, digests: Iterable[str]) -> Iterator[Finding]:
    """Read blobs of which no log tells: each has at least the digest that it is named for."""
    for digest in digests:
        try:
            demand_digest(blobs.file(digest), digest)
        except FileNotFoundError:
            continue  # freed meanwhile
        except DataLossError as error:
            yield Finding(f"blob {digest}", BLOB_DIGEST, error.message, FROM_BACKUP)
        except OSError as error:
            text = f"it cannot be read: {error.strerror}"
            yield Finding(f"blob {digest}", BLOB_READ, text, FROM_BACKUP)


def missing_blobs(missing: Collection[str], needs: Mapping[str, Need]) -> Iterator[Finding]:
    """Say of blobs that they are missing, and who needs them."""
    for digest in sorted(missing):
        text = f"it is missing, {needs[digest].who}"
        yield Finding(f"blob {digest}", BLOB_MISSING, text, FROM_BACKUP)


def _check_blob(path: Path, digest: str, need: Need, deep: bool) -> Iterator[Finding]:
    where, status = f"blob {digest}", path.lstat()
    if stat.S_ISLNK(status.st_mode) and path.stat():
        return  # said with the rights
    if not stat.S_ISREG(status.st_mode):
        yield Finding(where, BLOB_READ, f"it is no plain file; {need.who}", FROM_BACKUP)
    elif status.st_size != need.size:
        text = f"it has {status.st_size} bytes, the log says {need.size}; {need.who}"
        yield Finding(where, BLOB_SIZE, text, FROM_BACKUP)
    elif deep:
        try:
            demand_digest(path, digest)
            if need.is_model:
                read_layout(path)
        except DataLossError as error:
            yield Finding(where, BLOB_DIGEST, error.message, FROM_BACKUP)
        except ModelFormatError as error:
            yield Finding(where, BLOB_MODEL, str(error), FROM_BACKUP)


def list_unneeded(blobs: BlobFolder, needs: Mapping[str, Need]) -> Iterator[Finding]:
    """Name blobs that the log does not need, uploads that were cut off, and foreign files."""
    for path, size in _sizes(blobs.root):
        digest = f"blake3:{path.name}"
        if is_digest(digest) and digest not in needs:
            text = f"{size} bytes that no run needs"
            hint = "an upload, a leftover, or a model whose event the log has lost; a server "
            hint += "removes it when it is a day old, unless it knows that the log lacks events"
            yield note(f"blob {digest}", UNREFERENCED, text, hint)
        elif not is_digest(digest) and path.name != INCOMING and not path.name.startswith("."):
            yield note(
                f"{BLOBS}/{path.name}", FOREIGN, "it is no blob, and no release puts it there",
                "the server leaves it alone; put it elsewhere",
            )  # fmt: skip
    for part, size in _sizes(blobs.root / INCOMING):
        yield note(
            f"{BLOBS}/{INCOMING}/{part.name}", PARTIAL, f"{size} bytes so far",
            f"its site goes on with it; the server removes it after {KEEP_PARTS_S / 3600:.0f} h "
            "without a byte",
        )  # fmt: skip


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield what lies in a folder that a server is at work on, by name, with its bytes."""
    with suppress(PermissionError):  # said with the rights
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            with suppress(FileNotFoundError):
                yield path, path.lstat().st_size


def check_files(place: Place, logs: bool = True) -> Iterator[Finding]:
    """Check the rights of all files of the state and the logs, and that small files are whole.

    Args:
        place: the state.
        logs: look at the server's logs too, which no backup holds.
    """
    for root in place.roots if logs else place.roots[:1]:
        yield from _check_root(place, root)
    yield from _check_log_elsewhere(place)
    for small in _JSON_FILES:
        try:
            json.loads((place.folder / small).read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            yield Finding(f"{place.folder.name}/{small}", WHOLE_FILE, f"not JSON: {error}")
        except OSError as error:
            text = f"it cannot be read: {error.strerror}"
            yield Finding(f"{place.folder.name}/{small}", WHOLE_FILE, text)


def _check_root(place: Place, root: Path) -> Iterator[Finding]:
    unread: dict[Path, OSError] = {}

    def note_error(error: OSError) -> None:
        unread.setdefault(Path(error.filename), error)

    for path in _walk(root, note_error):
        name = str(path.relative_to(place.base))
        try:
            status = path.stat() if path == root else path.lstat()  # a root may be a link
        except FileNotFoundError:  # a running server writes and removes
            continue
        except OSError as error:
            unread.setdefault(path.parent, error)
            continue
        yield from _check_rights(path, name, status, path.parent == place.blobs.root)
        if path.name.startswith(".tmp-"):
            yield note(
                name, TEMPORARY, "left by a write that did not end, or being written",
                "if no server runs, remove it",
            )  # fmt: skip
    for folder, why in unread.items():
        if why.errno != errno.ENOENT:
            text = f"what is in it cannot be read: {why.strerror}"
            advice = f"give it to user id {os.geteuid()}, and run: chmod 700 {folder}"
            yield Finding(str(folder.relative_to(place.base)), RIGHTS, text, advice)


def _walk(root: Path, on_error: Callable[[OSError], object]) -> Iterator[Path]:
    if not root.is_dir():
        return
    yield root
    for folder, folders, files in os.walk(root, onerror=on_error):
        for name in sorted([*folders, *files]):
            yield Path(folder) / name


def _check_log_elsewhere(place: Place) -> Iterator[Finding]:
    """Check the rights of a SQLite log outside of the state."""
    path = sqlite_file(place.target)
    if path is None or any(path.is_relative_to(root) for root in place.roots):
        return
    for each in (path, *(Path(f"{path}{end}") for end in SQLITE_ENDS)):
        with suppress(FileNotFoundError):
            yield from _check_rights(each, str(each), each.stat(), in_blobs=False)
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.parent.stat().st_mode)
        if mode & 0o022 and not mode & stat.S_ISVTX:
            text = f"mode {mode:04o} lets others put another event log there"
            yield Finding(str(path.parent), RIGHTS, text, f"run: chmod go-w {path.parent}")


def _check_rights(
    path: Path, name: str, status: os.stat_result, in_blobs: bool
) -> Iterator[Finding]:
    mode = stat.S_IMODE(status.st_mode)
    is_blob = in_blobs and is_digest(f"blake3:{path.name}")
    if stat.S_ISLNK(status.st_mode):
        kind = "folder" if os.path.isdir(path) else "file"  # noqa: PTH112 - may be unreadable
        yield Finding(name, RIGHTS, "is a symbolic link", f"put the {kind} itself there")
    elif stat.S_ISREG(status.st_mode) and is_blob:
        if mode & ~_PUBLIC_IN_PRIVATE:
            text = f"mode {mode:04o}, a blob is never written again"
            yield Finding(name, RIGHTS, text, f"run: chmod 444 {path}")
    elif mode == _PUBLIC_IN_PRIVATE and (in_blobs or path.suffix == ".part"):
        pass
    elif mode & 0o077:
        right = "700" if stat.S_ISDIR(status.st_mode) else "600"
        yield Finding(name, RIGHTS, f"mode {mode:04o} lets others in", f"run: chmod {right} {path}")
    if status.st_uid not in (os.geteuid(), 0):
        yield Finding(name, RIGHTS, f"belongs to user id {status.st_uid}", "chown it to the server")
    elif stat.S_ISREG(status.st_mode) and not os.access(path, os.R_OK) and path.exists():
        user = os.geteuid()
        text = f"mode {mode:04o}, owner {status.st_uid}: user id {user} cannot read it"
        yield Finding(name, RIGHTS, text, f"run: chown {user} {path} && chmod u+r {path}")


def check_audit(place: Place) -> tuple[Head, list[Finding]]:
    """Verify the chain and its signed checkpoint; return the last record too.

    A damage that shows only while the server writes is not one: it is looked at twice.
    """
    path, seal = place.folder / AUDIT, KitSeal(place.kit)
    where = f"{place.folder.name}/{AUDIT}"
    advice = "keep the evidence: copy the audit elsewhere before anything else"
    if not path.exists() and not [*path.parent.glob(f"{AUDIT}.0*")]:
        return Head(), [Finding(where, AUDIT_CHAIN, "there is no audit", RESTORE)]
    try:
        try:
            head = verify(path, seal)
        except (DataLossError, FileNotFoundError):
            head = verify(path, seal)
        unfinished = 0 if place.opened else unfinished_bytes(path)
    except FLError as error:
        return Head(), [Finding(where, AUDIT_CHAIN, error.message, error.hint or advice)]
    except (OSError, ValueError, KeyError) as error:
        return Head(), [Finding(where, AUDIT_CHAIN, str(error), advice)]
    if not unfinished:
        return head, []
    text = f"its last record is unfinished ({unfinished} bytes) and was never acknowledged"
    return head, [note(where, AUDIT_CHAIN, text, "it is mended at the next start")]


def submissions_in(audit: Path) -> int:
    """Return how many commands the audit tells of that end in events, so far as it can be read."""
    count = 0
    with suppress(FLError, OSError, ValueError, KeyError):
        for record in records(audit):
            count += record["action"] in _LOGGED and record["decision"] == "allowed"
    return count
