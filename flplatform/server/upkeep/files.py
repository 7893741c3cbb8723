"""The checks of files: blobs, rights, temporary files, small files, the audit."""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from flplatform.core.errors import DataLossError, FLError, ModelFormatError
from flplatform.files.digest import demand_digest
from flplatform.files.modelfile import read_layout
from flplatform.security.audit import Head, KitSeal, verify
from flplatform.server.upkeep.findings import RESTORE, Finding, note
from flplatform.server.upkeep.place import AUDIT, BLOBS, BlobFolder, Need, Place

BLOB_MISSING = "blob is there"
BLOB_SIZE = "I5 blob size"
BLOB_DIGEST = "I5 blob digest"
BLOB_MODEL = "I5 model file"
UNREFERENCED = "unreferenced blob"
PARTIAL = "partial upload"
WHOLE_FILE = "I5 whole file"
TEMPORARY = "temporary file"
RIGHTS = "rights"
AUDIT_CHAIN = "I7 audit chain"

_JSON_FILES = ("users.json", "sites.json", "login_attempts.json")
_PUBLIC_IN_PRIVATE = 0o444
_FROM_BACKUP = "put it back from a backup: its blobs folder has files of the same names"


def check_blobs(blobs: BlobFolder, needs: Mapping[str, Need], deep: bool) -> Iterator[Finding]:
    """Check that what is needed is there, whole, and what it should be.

    Args:
        blobs: the folder.
        needs: what the log needs.
        deep: compute every digest, and read the header of every model.
    """
    for digest, need in sorted(needs.items()):
        where = f"blob {digest}"
        who = f"run {need.by} needs it" if need.by else "a staged job needs it"
        path = blobs.file(digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            yield Finding(where, BLOB_MISSING, f"it is missing, {who}", _FROM_BACKUP)
            continue
        if size != need.size:
            text = f"it has {size} bytes, the log says {need.size}; {who}"
            yield Finding(where, BLOB_SIZE, text, _FROM_BACKUP)
        elif deep:
            yield from _check_content(path, digest, need)


def _check_content(path: Path, digest: str, need: Need) -> Iterator[Finding]:
    where = f"blob {digest}"
    try:
        demand_digest(path, digest)
        if need.is_model:
            read_layout(path)
    except FileNotFoundError:
        yield Finding(where, BLOB_MISSING, "it has gone meanwhile", _FROM_BACKUP)
    except DataLossError as error:
        yield Finding(where, BLOB_DIGEST, error.message, _FROM_BACKUP)
    except ModelFormatError as error:
        yield Finding(where, BLOB_MODEL, str(error), _FROM_BACKUP)


def list_unneeded(blobs: BlobFolder, needs: Mapping[str, Need]) -> Iterator[Finding]:
    """Name blobs that the log does not need, and uploads that were cut off."""
    for digest in blobs.digests():
        path = blobs.root / digest.partition(":")[2]
        if digest not in needs and path.exists():
            text = f"{path.stat().st_size} bytes that no run needs"
            hint = "an upload that is still to be accepted, or a leftover: harmless"
            yield note(f"blob {digest}", UNREFERENCED, text, hint)
    incoming = blobs.root / "incoming"
    for part in sorted(incoming.iterdir()) if incoming.is_dir() else ():
        yield note(
            f"{BLOBS}/incoming/{part.name}", PARTIAL, f"{part.stat().st_size} bytes so far",
            "its site goes on with it; after a week the server removes it at a start",
        )  # fmt: skip


def check_files(place: Place) -> Iterator[Finding]:
    """Check the rights of all files of the state and the logs, and that small files are whole."""
    blobs = place.folder / BLOBS
    for root in (place.folder, place.kit.folder / "logs"):
        for path in _walk(root):
            name = str(path.relative_to(place.kit.folder))
            try:
                status = path.lstat()
            except FileNotFoundError:  # a running server writes and removes
                continue
            yield from _check_rights(path, name, status, path.parent == blobs)
            if path.name.startswith(".tmp-"):
                yield note(
                    name, TEMPORARY, "left by a write that did not end, or being written",
                    "if no server runs, remove it",
                )  # fmt: skip
    for small in _JSON_FILES:
        if (path := place.folder / small).exists():
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                yield Finding(f"{place.folder.name}/{small}", WHOLE_FILE, f"not JSON: {error}")


def _walk(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        return
    yield root
    for folder, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            yield Path(folder) / name


def _check_rights(
    path: Path, name: str, status: os.stat_result, is_blob: bool
) -> Iterator[Finding]:
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        yield Finding(name, RIGHTS, "is a symbolic link", "remove it: no release makes one")
    elif stat.S_ISREG(status.st_mode) and is_blob and not path.name.startswith("."):
        if mode & ~_PUBLIC_IN_PRIVATE:
            text = f"mode {mode:04o}, a blob is never written again"
            yield Finding(name, RIGHTS, text, f"run: chmod 444 {path}")
    elif mode & 0o077 and not (path.suffix == ".part" and mode == _PUBLIC_IN_PRIVATE):
        right = "700" if stat.S_ISDIR(status.st_mode) else "600"
        yield Finding(name, RIGHTS, f"mode {mode:04o} lets others in", f"run: chmod {right} {path}")
    if status.st_uid not in (os.geteuid(), 0):
        yield Finding(name, RIGHTS, f"belongs to user id {status.st_uid}", "chown it to the server")


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
            return verify(path, seal), []
        except (DataLossError, FileNotFoundError):
            return verify(path, seal), []
    except (FLError, OSError) as error:
        return Head(), [Finding(where, AUDIT_CHAIN, str(error), advice)]


def utc_stamp(now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> str:
    """Return the time for a file's name."""
    return now().strftime("%Y%m%dT%H%M%SZ")
