"""How a SQLite log is opened to read only, also where nothing can be written beside it.

SQLite keeps an index of the write-ahead log beside the file, and makes it for readers too. A disk
that is full or read-only, or a folder of somebody else, has no room for it.
"""

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flplatform.core.errors import NotFoundError, UnavailableError
from flplatform.files.durable import why_no_folder
from flplatform.files.lock import is_held
from flplatform.store.sqlite import BUSY_TIMEOUT_S

PUT_THERE = "mount its disk, or put the folder there"
"""What to do where a file, or a link to nowhere, is in the place of a folder."""
_NOTHING_BESIDE = ("SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_READONLY")
_ACCOUNT = "run this as the account that the server runs under"


def connect(uri: str) -> sqlite3.Connection:
    """Open what `readable` yields."""
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)


@contextmanager
def readable(path: Path) -> Iterator[str]:
    """Find out how a SQLite file can be read: as it lies, without its index, or as a copy.

    Yields:
        The URI to open.

    Raises:
        NotFoundError: there is none.
        UnavailableError: it cannot be read, or was written meanwhile.
    """
    try:
        if why := why_no_folder(path.parent):
            raise NotFoundError(f"there is no event log: {why}", hint=PUT_THERE)
        if not path.is_file():
            raise NotFoundError(f"there is no event log {path}", hint="was a server started?")
    except PermissionError as error:
        raise UnavailableError(f"{path}: {error.strerror}", hint=_ACCOUNT) from None
    real = path.resolve()
    uri = f"{real.as_uri()}?mode=ro"
    if not (why := _why_not(uri)):
        yield uri
        return
    try:
        if not os.access(real, os.R_OK) or is_held(real.with_name(f"{real.name}.lock")):
            raise UnavailableError(f"{path}: {why}", hint=_ACCOUNT)
    except PermissionError:
        raise UnavailableError(f"{path}: {why}", hint=_ACCOUNT) from None
    wal, before = Path(f"{real}-wal"), real.stat()
    if not wal.exists() or wal.stat().st_size == 0:
        yield f"{uri}&immutable=1"
    else:
        with tempfile.TemporaryDirectory(prefix="fl_state-") as folder:
            yield _copied((real, wal), Path(folder), f"{path}: {why}")
    after = real.stat()
    if (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
        raise UnavailableError(f"{path} was written while it was read", hint="try again")


def _why_not(uri: str) -> str:
    """Return why a file cannot be read as it lies; whether it is damaged shows later."""
    try:
        with closing(connect(uri)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        name = getattr(error, "sqlite_errorname", "")
        return str(error) if name.startswith(_NOTHING_BESIDE) else ""
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        pass
    return ""


def _copied(files: tuple[Path, ...], folder: Path, why: str) -> str:
    """Copy a database and its write-ahead log; return the copy's URI."""
    failed = ""
    try:
        for each in files:
            shutil.copyfile(each, folder / each.name)
    except OSError as error:
        failed = error.strerror or str(error)
    if failed:  # a shortage here is not one where somebody writes to
        raise UnavailableError(
            f"{why}; nor can a copy of it be made in {folder.parent}: {failed}",
            hint="name a folder with room in the environment variable TMPDIR",
        )
    return f"{(folder / files[0].name).as_uri()}?mode=ro"
