"""Event streams in a database: one writer thread, one commit for many callers.

What only SQLite needs stands in `_SqliteFile`; all other SQL here is understood by any database,
so that another one is one more class beside it.
"""

import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Integer,
    String,
    column,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    table,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from flplatform.core.errors import (
    AlreadyExistsError,
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.files.durable import PRIVATE_FILE, fsync_dir, private_dir

MAX_GROUP = 1000
"""How many appends share one commit at most."""
BUSY_TIMEOUT_S = 30.0

STEPS = (
    """CREATE TABLE events (
        stream VARCHAR NOT NULL,
        seq INTEGER NOT NULL,
        time VARCHAR NOT NULL,
        type VARCHAR NOT NULL,
        version INTEGER NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (stream, seq)
    )""",
)
"""Step n leads from schema n to n + 1; a released step is never edited."""

_EVENTS = table(
    "events",
    column("stream", String),
    column("seq", Integer),
    column("time", String),
    column("type", String),
    column("version", Integer),
    column("body", String),
)
_SCHEMA = table("schema_version", column("version", Integer))


class _SqliteFile:
    """A SQLite database that this process alone writes: WAL, synchronous=FULL, a lock file.

    Raises:
        ConfigError: the URL names no file, or its file system cannot hold a write-ahead log.
        FailedPreconditionError: another process has the database open.
        DataLossError: the file is damaged.
    """

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
                raise DataLossError(
                    f"{path} is damaged: {found[0]}", hint="restore it from a backup"
                )
        fsync_dir(path.parent)

    def _lock(self, path: Path, closing: ExitStack) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        closing.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace") or "?"
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

    @staticmethod
    def no_space(error: DBAPIError) -> bool:
        """Return whether a write failed, and was undone, for want of space."""
        found = getattr(error.orig, "sqlite_errorname", "")
        return found in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Translate the driver's errors.

        Raises:
            DataLossError: the file is damaged.
            UnavailableError: anything else.
        """
        try:
            yield
        except DBAPIError as error:
            damaged = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
            if getattr(error.orig, "sqlite_errorname", "").startswith(damaged):
                raise DataLossError(
                    f"{self.name} is damaged: {error.orig}", hint="restore it from a backup"
                ) from error
            raise UnavailableError(f"{self.name}: {error.orig}") from error


@dataclass(frozen=True, slots=True)
class _Append:
    rows: tuple[Row, ...]
    future: "Future[None]" = field(default_factory=Future)


class SqlStateStore:
    """`ports.StateStore` over SQLAlchemy; SQLite in this release.

    Args:
        target: path of a SQLite file, made if missing, or a database URL.
        on_fatal: called once, in the writer thread, when a write failed for another reason than
            want of space. What is on disk is then unknown: it should end the process.

    Raises:
        ConfigError: the URL is malformed or its database is not supported.
        FailedPreconditionError: another process has the database open, or a newer release wrote it.
        DataLossError: the database is damaged.
        UnavailableError: it cannot be opened.
    """

    def __init__(self, target: str | Path, on_fatal: Callable[[BaseException], None]) -> None:
        self._on_fatal = on_fatal
        self._failure: BaseException | None = None
        self._closed = False
        self._entry = threading.Lock()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._heads: dict[str, int] = {}
        with ExitStack() as closing:
            self._database = _SqliteFile(_sqlite_url(target), closing)
            self._engine: Engine = self._database.engine
            with self._database.explained():
                self._connection = closing.enter_context(self._engine.connect())
                _migrate(self._connection, self._database.name)
            self._closing = closing.pop_all()
        self._writer = threading.Thread(target=self._run, name="state-store", daemon=True)
        self._writer.start()

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        """Append rows in one transaction; see `ports.StateStore`. It cannot be cancelled.

        The future raises AlreadyExistsError, ResourceExhaustedError or, once a write has failed or
        the store is closed, UnavailableError.
        """
        append = _Append(tuple(rows))
        append.future.set_running_or_notify_cancel()
        with self._entry:
            if not self._closed:
                self._queue.put(append)
                return append.future
        append.future.set_exception(UnavailableError("the state store is closed"))
        return append.future

    def read(self, stream: str, after: int = 0) -> list[Row]:
        """Return the rows of a stream with seq > `after`, in order.

        Raises:
            UnavailableError: the store has failed or is closed.
            DataLossError: the database is damaged.
        """
        query = (
            select(*_EVENTS.c)
            .where(_EVENTS.c.stream == stream, _EVENTS.c.seq > after)
            .order_by(_EVENTS.c.seq)
        )
        with self._reading() as connection:
            return [Row(*row) for row in connection.execute(query)]

    def streams(self, prefix: str = "") -> list[str]:
        """Return the names of all streams that start with `prefix`, sorted.

        Raises:
            UnavailableError: the store has failed or is closed.
            DataLossError: the database is damaged.
        """
        start = func.substr(_EVENTS.c.stream, 1, len(prefix))
        query = select(_EVENTS.c.stream).where(_EVENTS.c.seq == 1, start == prefix)
        with self._reading() as connection:
            return sorted(connection.scalars(query))

    def close(self) -> None:
        """Write what was accepted, then release the database. Not to be called by `on_fatal`."""
        with self._entry:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._writer.join()
        self._closing.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        if self._failure is not None:
            raise _refusal(self._failure)
        if self._closed:
            raise UnavailableError("the state store is closed")
        with self._database.explained(), self._engine.connect() as connection:
            yield connection

    def _run(self) -> None:
        group: list[_Append] = []
        last = False
        while not last:
            append = self._queue.get()
            while append is not None:
                group.append(append)
                if len(group) == MAX_GROUP or self._queue.empty():
                    break
                append = self._queue.get()
            last = append is None
            try:
                if self._failure is None and group:
                    self._write(group)
            except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may wait for it
                self._failure = error
                self._on_fatal(error)
            finally:
                for unsettled in (each for each in group if not each.future.done()):
                    unsettled.future.set_exception(_refusal(self._failure))
                group.clear()

    def _write(self, group: list[_Append]) -> None:
        """Write a group in one transaction and settle its futures.

        Without space for all of them, each is tried alone.
        """
        try:
            refusals = self._commit(group)
        except DBAPIError as error:
            if not self._database.no_space(error):
                raise
            if len(group) > 1:
                for append in group:
                    self._write([append])
            else:
                full = ResourceExhaustedError("no space left for the state store", rule="disk")
                group[0].future.set_exception(full)
            return
        for append, refusal in zip(group, refusals, strict=True):
            if refusal is None:
                append.future.set_result(None)
            else:
                append.future.set_exception(refusal)

    def _commit(self, group: list[_Append]) -> list[FLError | None]:
        """Return, for each append of one committed transaction, why it was left out, if it was."""
        heads: dict[str, int] = {}
        with self._connection.begin():
            refusals = [self._admit(append.rows, heads) for append in group]
            rows = [
                asdict(row)
                for append, refusal in zip(group, refusals, strict=True)
                if refusal is None
                for row in append.rows
            ]
            if rows:
                self._connection.execute(insert(_EVENTS), rows)
        self._heads.update(heads)
        return refusals

    def _admit(self, rows: Sequence[Row], heads: dict[str, int]) -> FLError | None:
        """Advance `heads`, the streams' last seqs, by `rows`, or return why they do not fit."""
        mine: dict[str, int] = {}
        for row in rows:
            head = mine.get(row.stream, heads.get(row.stream, -1))
            if head < 0:
                head = self._head(row.stream)
            if row.seq != head + 1:
                what = "is taken" if row.seq <= head else f"would leave a gap after {head}"
                return AlreadyExistsError(f"event {row.seq} of {row.stream} {what}")
            mine[row.stream] = row.seq
        heads.update(mine)
        return None

    def _head(self, stream: str) -> int:
        if stream not in self._heads:
            query = select(func.max(_EVENTS.c.seq)).where(_EVENTS.c.stream == stream)
            self._heads[stream] = self._connection.scalar(query) or 0
        return self._heads[stream]


def _refusal(failure: BaseException | None) -> UnavailableError:
    return UnavailableError(
        f"the state store has failed: {failure}", hint="see the server's log, then restart it"
    )


def _sqlite_url(target: str | Path) -> URL:
    if isinstance(target, Path) or "://" not in target:
        return URL.create("sqlite", database=str(target))
    try:
        url = make_url(target)
    except ArgumentError as error:
        raise ConfigError(f"not a database URL: {error}") from None
    if url.get_backend_name() != "sqlite":
        raise ConfigError(
            f"this release keeps its state in SQLite, not in {url.get_backend_name()}",
            hint="use sqlite:////path/to/file",
        )
    return url


def _migrate(connection: Connection, name: str) -> None:
    """Bring the schema up to this release, in one transaction.

    Raises:
        FailedPreconditionError: a newer release wrote the database.
    """
    with connection.begin():
        version: Any = 0
        if inspect(connection).has_table(_SCHEMA.name):
            version = connection.scalar(select(_SCHEMA.c.version))
        else:
            connection.execute(text("CREATE TABLE schema_version (version INTEGER NOT NULL)"))
            connection.execute(insert(_SCHEMA).values(version=0))
        if version > len(STEPS):
            raise FailedPreconditionError(
                f"{name} has schema {version}; this release knows schemas up to {len(STEPS)}",
                hint="start the newer release that wrote it",
            )
        for step in STEPS[version:]:
            connection.execute(text(step))
        if version < len(STEPS):
            connection.execute(update(_SCHEMA).values(version=len(STEPS)))
