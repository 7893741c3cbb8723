"""The event log as it was at one moment, read beside whoever writes it.

Nothing here writes to the database or takes its writer's lock.
"""

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    NotFoundError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.files.durable import PRIVATE_FILE
from flplatform.files.shortage import probe
from flplatform.store.postgres import PostgresDatabase
from flplatform.store.reading import connect, readable
from flplatform.store.schema import EVENTS, migrate, read_origin, read_version
from flplatform.store.state import SqlStateStore
from flplatform.store.targets import demand_url

SCAN_SILENCE_S = 600.0
"""A scan of a whole log says nothing until it is through."""

_COLUMNS = ("stream", "seq", "time", "type", "version", "body")
_TYPES = {"seq": "integer", "version": "integer"}
"""What SQLite must have stored in a column; in the others it must be text."""
_RAW = ", ".join(f"typeof({name}), CAST({name} AS BLOB)" for name in _COLUMNS)
_ROWS = text(
    f"SELECT {_RAW} FROM events "  # noqa: S608 - only the names of columns
    "WHERE stream = CAST(:stream AS TEXT) OR stream = :stream ORDER BY events.seq"
)
_STREAMS = text("SELECT DISTINCT CAST(stream AS BLOB) FROM events")


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """What stands in the place of a row and is none.

    Attributes:
        seq: its number; 0 if that is lost too.
        text: what is wrong, as what follows its name in a sentence.
    """

    seq: int
    text: str


def _row(raw: Sequence[Any]) -> Row | DamagedRow:
    """Read a row: for each column how SQLite has stored it, and its bytes."""
    values: dict[str, Any] = {}
    wrong = []
    for name, stored, data in zip(_COLUMNS, raw[::2], raw[1::2], strict=True):
        wanted = _TYPES.get(name, "text")
        if stored != wanted:
            wrong.append(f"{name} is stored as {stored}, not as {wanted}")
            continue
        try:
            value = data.decode()
            values[name] = int(value) if wanted == "integer" else value
        except UnicodeDecodeError:
            wrong.append(f"{name} holds bytes that are no text")
    if wrong:
        return DamagedRow(values.get("seq", 0), f"is damaged: {', '.join(wrong)}")
    return Row(**values)


def _name(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


class Snapshot:
    """All streams in one read transaction: what is appended meanwhile is not seen.

    Attributes:
        name: what messages call the database; never holds a password.
        origin: the id of the log; empty before the first start that gives it one.
    """

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        if read_version(connection, name) is None:
            raise NotFoundError(f"{name} holds no event log", hint="no server has used it yet")
        if not inspect(connection).has_table(EVENTS.name):
            raise DataLossError(f"{name} has lost its events", hint="restore it from a backup")
        self.origin = read_origin(connection)

    @property
    def _may_hold_anything(self) -> bool:
        """Whether values may be of any type and bytes: PostgreSQL checks what it is given."""
        return self._connection.dialect.name == "sqlite"

    def streams(self) -> list[str]:
        """Return the names of all streams, also of such that lack their first event.

        Bytes that are no UTF-8 are in them as `surrogateescape` decodes them.
        """
        if not self._may_hold_anything:
            return sorted(self._connection.scalars(select(EVENTS.c.stream).distinct()))
        return sorted(
            {_name(name) for name in self._connection.scalars(_STREAMS) if name is not None}
        )

    def read(self, stream: str) -> list[Row]:
        """Return the rows of a stream in the order of their numbers.

        Raises:
            DataLossError: one of them cannot be read.
        """
        rows: list[Row] = []
        for row in self.scan(stream):
            if isinstance(row, DamagedRow):
                raise DataLossError(f"{stream}#{row.seq} {row.text}")
            rows.append(row)
        return rows

    def scan(self, stream: str) -> "list[Row | DamagedRow]":
        """Return the rows of a stream in the order of their numbers, also those that are no rows.

        Args:
            stream: as `streams` names it.
        """
        if not self._may_hold_anything:
            query = select(*EVENTS.c).where(EVENTS.c.stream == stream).order_by(EVENTS.c.seq)
            return [Row(*row) for row in self._connection.execute(query)]
        found: list[Row | DamagedRow] = []
        try:
            values = {"stream": stream.encode(errors="surrogateescape")}
            found.extend(_row(row) for row in self._connection.execute(_ROWS, values))
        except DBAPIError as error:
            if not _is_damage(error.orig):
                raise
            found.append(DamagedRow(0, f"and what follows cannot be read: {error.orig}"))
        return found

    def damage(self, deep: bool) -> list[str]:
        """Return what the database itself finds wrong with its file; PostgreSQL has no such test.

        Args:
            deep: compare the indexes with the tables too.
        """
        if self._connection.dialect.name != "sqlite":
            return []
        check = "integrity_check" if deep else "quick_check"
        try:
            found = [str(line) for line in self._connection.scalars(text(f"PRAGMA {check}(10)"))]
        except DBAPIError as error:
            if not _is_damage(error.orig):
                raise
            found = [str(error.orig)]
        return [" ".join(line.split()) for line in found if line != "ok"]

    def copy(self, path: Path) -> None:
        """Write the log into a new SQLite file, the portable form, durable on return.

        Gaps between the events are copied as they are.

        Raises:
            DataLossError: it is damaged so much that it cannot be copied.
            UnavailableError: it cannot be written; its cause is the shortage, if there is one.
        """
        path.touch(mode=PRIVATE_FILE, exist_ok=False)
        source: Any = self._connection.connection.dbapi_connection
        with _writing(path):
            if isinstance(source, sqlite3.Connection):
                with closing(sqlite3.connect(path)) as target:
                    source.backup(target)
                    # The copy is one file: its log is written back, and it opens without one.
                    target.execute("PRAGMA journal_mode=DELETE")
            else:
                self._copy_rows(path)

    def _copy_rows(self, path: Path) -> None:
        engine = create_engine(
            URL.create("sqlite", database=str(path)), poolclass=NullPool, hide_parameters=True
        )
        with engine.begin() as connection:
            migrate(connection, str(path), secrets.token_hex(16), self.origin)
            for stream in self.streams():
                rows = [asdict(row) for row in self.scan(stream) if isinstance(row, Row)]
                connection.execute(insert(EVENTS), rows)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Explain what goes wrong with a new SQLite file, and not with a database that is read."""
    try:
        yield
    except (sqlite3.Error, DBAPIError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, sqlite3.Error):
            raise
        if _is_damage(cause):
            raise DataLossError(f"the log cannot be copied: {cause}") from error
        text = f"{path} cannot be written: {cause}"
        raise UnavailableError(text) from (probe(path.parent) or cause)


def open_store(target: str | Path, origin: str = "") -> SqlStateStore:
    """Open a store for one-off work: a failed write is raised by its append alone.

    Args:
        target: as `SqlStateStore`.
        origin: the id that the log is to carry; empty for its own.

    Raises:
        FLError: as `SqlStateStore`; FailedPreconditionError while a server has it open.
    """
    return SqlStateStore(target, lambda _error: None, origin=origin)


@contextmanager
def snapshot(target: str | Path) -> Iterator[Snapshot]:
    """Read a log as it is now.

    Args:
        target: path of a SQLite file or a database URL, as `state_url`.

    Raises:
        NotFoundError: there is none.
        ConfigError: the URL is malformed, or its database not supported.
        FailedPreconditionError: a newer release wrote it.
        DataLossError: it is damaged.
        UnavailableError: it cannot be read.
    """
    with ExitStack() as stack:
        name, engine, explained = _reading(target, stack)
        stack.callback(engine.dispose)
        stack.enter_context(explained)
        connection = stack.enter_context(engine.connect())
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        with connection.begin():
            yield Snapshot(name, connection)


def sqlite_file(target: str | Path) -> Path | None:
    """Return the file of a SQLite log; None for a log that is elsewhere.

    Raises:
        ConfigError: the URL is malformed.
    """
    url = demand_url(target)
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _reading(
    target: str | Path, stack: ExitStack
) -> tuple[str, Engine, AbstractContextManager[None]]:
    """Return what messages call a database, its engine and what explains its errors."""
    url = demand_url(target)
    match url.get_backend_name():
        case "sqlite":
            path = Path(url.database or "")
            return str(path), _sqlite(stack.enter_context(readable(path))), _explained(path)
        case "postgresql":
            database = PostgresDatabase(url, SCAN_SILENCE_S)
            return database.name, database.engine, database.explained()
        case other:
            raise ConfigError(f"state_url: no state can be kept in {other}")


def _sqlite(uri: str) -> Engine:
    engine = create_engine(
        "sqlite://", creator=lambda: connect(uri), poolclass=NullPool, hide_parameters=True
    )
    # The driver does not begin before reads by itself.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:  # of a table's definition, which is in SQLite's message
        raise DataLossError(f"{path}: {error}", hint="restore it from a backup") from error
    except DBAPIError as error:
        what = f"{path}: {error.orig}"
        if _is_damage(error.orig):
            raise DataLossError(what, hint="restore it from a backup") from error
        raise UnavailableError(what) from error


def _is_damage(error: BaseException | None) -> bool:
    name = getattr(error, "sqlite_errorname", "")
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "UTF-8" in str(error)
