"""The state store in a SQLite file."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.files.durable import PRIVATE_FILE, fsync_dir, private_dir
from flplatform.files.shortage import probe

BUSY_TIMEOUT_S = 30.0


class SqliteFile:
    """A SQLite database that this process alone writes: WAL, synchronous=FULL, a lock file.

    Raises:
        ConfigError: the URL names no file, or its file system cannot hold a write-ahead log.
        FailedPreconditionError: another process has the database open.
        DataLossError: the file is damaged.
    """

    ping_s: float | None = None
    remote = False

    def __init__(self, url: URL, closing: ExitStack) -> None:
        if not url.database or url.database == ":memory:":
            raise ConfigError("a SQLite state store needs a file", hint="sqlite:////path/to/file")
        path = Path(url.database)
        self.name = str(path)
        private_dir(path.parent)
        self._lock(path.with_name(f"{path.name}.lock"), closing)
        path.touch(mode=PRIVATE_FILE)  # the log beside it takes over these rights
        self.engine = create_engine(
            url,
            poolclass=NullPool,
            hide_parameters=True,
            connect_args={
                "timeout": BUSY_TIMEOUT_S,
                "isolation_level": None,
                "check_same_thread": False,
            },
        )
        event.listen(self.engine, "connect", self._on_connect)
        event.listen(self.engine, "begin", self._on_begin)
        with self.explained(), self.engine.connect() as connection:
            found = connection.scalars(text("PRAGMA quick_check(1)")).all()
            if found != ["ok"]:
                what = " ".join(str(found[0]).split())  # it may have several lines
                raise DataLossError(f"{path} is damaged: {what}", hint="restore it from a backup")
        fsync_dir(path.parent)

    def _lock(self, path: Path, closing: ExitStack) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        closing.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace").strip() or "?"
            raise FailedPreconditionError(
                f"{self.name} is in use by process {owner}",
                hint="one server at a time may work on a state folder",
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)

    def _on_connect(self, connection: sqlite3.Connection, _record: object) -> None:
        (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise ConfigError(
                f"{self.name}: this file system cannot hold SQLite's write-ahead log",
                hint="put the state folder on a local disk",
            )
        connection.execute("PRAGMA synchronous=FULL")

    @staticmethod
    def _on_begin(connection: Connection) -> None:
        # The driver begins too late by itself: not before DDL, and not before reads.
        connection.exec_driver_sql("BEGIN")

    def connect(self) -> Connection:
        """Return a connection; see `database.Database`."""
        return self.engine.connect()

    def try_lock(self, _connection: Connection) -> str:
        """Return that nobody is in the way: the lock file has been ours since the opening."""
        return ""

    def lost(self, _error: DBAPIError) -> bool:
        """Return that a file is no connection: a failed write to it is final."""
        return False

    def refusal(self, error: DBAPIError) -> ResourceExhaustedError | None:
        """Return what to answer if a write failed, and was undone, for want of space."""
        found = getattr(error.orig, "sqlite_errorname", "")
        if found not in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):
            return None
        return ResourceExhaustedError("no space left for the state store", rule="disk")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Translate the driver's errors; see `database.Database`.

        Raises:
            DataLossError: the file is damaged.
            UnavailableError: anything else; its cause is the shortage, if there is one.
        """
        try:
            yield
        except UnicodeDecodeError as error:  # of a table's definition, as SQLite tells it
            raise DataLossError(
                f"{self.name} is damaged: {error}", hint="restore it from a backup"
            ) from error
        except DBAPIError as error:
            damaged = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
            name = getattr(error.orig, "sqlite_errorname", "")
            if name.startswith(damaged):
                raise DataLossError(
                    f"{self.name} is damaged: {error.orig}", hint="restore it from a backup"
                ) from error
            short = None
            if name.startswith(("SQLITE_CANTOPEN", "SQLITE_IOERR")):  # a quota, a descriptor: which
                short = probe(Path(self.name).parent)
            raise UnavailableError(f"{self.name}: {error.orig}") from (short or error)
