"""What a backup takes beside log and blobs: the audit, the small files, the kit's local files."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flplatform.files.durable import private_dir
from flplatform.server.upkeep.log_head import LOG_HEAD
from flplatform.server.upkeep.place import AUDIT, BLOBS, LOG, READY
from flplatform.server.upkeep.taking import copy_file, why_unreadable


def copy_audit(source: Path, target: Path) -> Iterator[str]:
    """Copy the audit: what says how long it is goes first, so that the copy is never too short.

    A record that is just being written is left out; if the file was filled meanwhile, again.

    Yields:
        What is wrong with a file that cannot be read.
    """
    ends = (f"{AUDIT}.head", f"{AUDIT}.checkpoint")
    while True:
        wrong = list[str]()
        before = sorted(path.name for path in source.glob(f"{AUDIT}.0*"))
        for name in (*ends, *before, AUDIT):
            (target / name).unlink(missing_ok=True)
            wrong += _copied(source, source / name, target / name)
        if before == sorted(path.name for path in source.glob(f"{AUDIT}.0*")):
            break
    yield from wrong
    current = target / AUDIT
    if current.exists():
        data = current.read_bytes()
        os.truncate(current, data.rfind(b"\n") + 1)
    for path in source.glob(f"{AUDIT}.torn-*"):
        yield from _copied(source, path, target / path.name)


def copy_state(source: Path, target: Path) -> Iterator[str]:
    """Copy what else is in the state folder; yield what is wrong with what cannot be read."""
    failed = list[OSError]()
    for path in files_in(source, failed.append):
        if not path.is_symlink() and _wanted(path.relative_to(source)):
            yield from _copied(source, path, target / path.relative_to(source))
    yield from _unlisted(source, failed)


def copy_local(source: Path, target: Path) -> Iterator[str]:
    """Copy the kit's local files, also those that are links; yield what is wrong.

    A link to a folder that lies elsewhere is a problem: it is not copied.
    """
    failed = list[OSError]()
    for path in files_in(source, failed.append):
        yield from _copied(source, path, target / path.relative_to(source))
    yield from _unlisted(source, failed)
    for folder, folders, _ in os.walk(source):
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
                name = path.relative_to(source)
                yield f"{source.name}/{name} is a link to a folder elsewhere, which is not taken"


def files_in(root: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    """Yield the plain files below a folder, and links to such."""
    for folder, _, names in os.walk(root, onerror=on_error):
        for path in (Path(folder, name) for name in sorted(names)):
            try:
                if path.is_file():
                    yield path
            except OSError as error:
                on_error(error)


def _wanted(path: Path) -> bool:
    """Return whether a file of the state folder is copied as it is; `path` is relative to it."""
    first = path.parts[0]
    return not (
        first in (BLOBS, READY, LOG_HEAD)
        or first.startswith((LOG, AUDIT))
        or path.name.endswith(".lock")
        or any(part.startswith(".tmp-") for part in path.parts)
    )


def _copied(root: Path, source: Path, target: Path) -> Iterator[str]:
    """Copy a file, if it is there; yield why it cannot be read."""
    private_dir(target.parent)
    try:
        copy_file(source, target)
    except FileNotFoundError:  # a running server removes some
        return
    except OSError as error:
        yield f"{root.name}/{source.relative_to(root)} {why_unreadable(error)}"


def _unlisted(root: Path, errors: list[OSError]) -> Iterator[str]:
    for error in errors:
        if error.errno != errno.ENOENT:
            name = Path(error.filename).relative_to(root)
            yield f"{root.name}/{name} {why_unreadable(error)}"
