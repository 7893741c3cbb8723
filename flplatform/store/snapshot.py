"""The event log as it was at one moment, read beside whoever writes it.

Nothing here writes to the database or takes its writer's lock.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.files.durable import PRIVATE_FILE
from flplatform.store.postgres import PostgresDatabase
from flplatform.store.schema import EVENTS, STEPS
from flplatform.store.sqlite import BUSY_TIMEOUT_S
from flplatform.store.state import SqlStateStore

SCAN_SILENCE_S = 600.0
"""A scan of a whole log says nothing until it is through."""

_VERSION = text("SELECT version FROM schema_version")


class Snapshot:
    """All streams in one read transaction: what is appended meanwhile is not seen.

    Attributes:
        name: what messages call the database; never holds a password.
    """

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        if not inspect(connection).has_table("schema_version"):
            raise NotFoundError(f"{name} holds no event log", hint="no server has used it yet")
        version: Any = connection.scalar(_VERSION)
        if version > len(STEPS):
            raise FailedPreconditionError(
                f"{name} has schema {version}; this release knows schemas up to {len(STEPS)}",
                hint="use the release that wrote it",
            )

    def streams(self) -> list[str]:
        """Return the names of all streams, also of such that lack their first event."""
        return sorted(self._connection.scalars(select(EVENTS.c.stream).distinct()))

    def read(self, stream: str) -> list[Row]:
        """Return the rows of a stream in the order of their numbers."""
        query = select(*EVENTS.c).where(EVENTS.c.stream == stream).order_by(EVENTS.c.seq)
        return [Row(*row) for row in self._connection.execute(query)]

    def damage(self, deep: bool) -> list[str]:
        """Return what the database itself finds wrong with its file; PostgreSQL has no such test.

        Args:
            deep: compare the indexes with the tables too.
        """
        if self._connection.dialect.name != "sqlite":
            return []
        check = "integrity_check" if deep else "quick_check"
        found = [str(line) for line in self._connection.scalars(text(f"PRAGMA {check}(10)"))]
        return [line for line in found if line != "ok"]

    def copy(self, path: Path) -> None:
        """Write the log into a new SQLite file, the portable form, durable on return.

        Raises:
            FLError: it cannot be written.
        """
        path.touch(mode=PRIVATE_FILE, exist_ok=False)
        source: Any = self._connection.connection.dbapi_connection
        if isinstance(source, sqlite3.Connection):
            with closing(sqlite3.connect(path)) as target:
                source.backup(target)
                # The copy is one file: its log is written back, and it opens without one.
                target.execute("PRAGMA journal_mode=DELETE")
            return
        with closing(open_store(path)) as store:
            for stream in self.streams():
                store.append(self.read(stream)).result()


def open_store(target: str | Path) -> SqlStateStore:
    """Open a store for one-off work: a failed write is raised by its append alone.

    Raises:
        FLError: as `SqlStateStore`; FailedPreconditionError while a server has it open.
    """
    return SqlStateStore(target, lambda _error: None)


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
        name, engine, explained = _reading(target)
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
    url = _url(target)
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def _reading(target: str | Path) -> tuple[str, Engine, AbstractContextManager[None]]:
    """Return what messages call a database, its engine and what explains its errors."""
    url = _url(target)
    match url.get_backend_name():
        case "sqlite":
            path = Path(url.database or "")
            if not path.is_file():
                raise NotFoundError(f"there is no event log {path}", hint="was a server started?")
            return str(path), _sqlite(path), _explained(path)
        case "postgresql":
            database = PostgresDatabase(url, SCAN_SILENCE_S)
            return database.name, database.engine, database.explained()
        case other:
            raise ConfigError(f"state_url: no state can be kept in {other}")


def _sqlite(path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        return sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
        )

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)
    # The driver does not begin before reads by itself.
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        what = f"{path}: {error.orig}"
        damaged = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
        if getattr(error.orig, "sqlite_errorname", "").startswith(damaged):
            raise DataLossError(what, hint="restore it from a backup") from error
        raise UnavailableError(what) from error


def _url(target: str | Path) -> URL:
    if isinstance(target, Path) or "://" not in target:
        return URL.create("sqlite", database=str(target))
    try:
        return make_url(target)
    except (ArgumentError, ValueError):  # their texts may hold the URL, and so a password
        raise ConfigError("state_url is not a database URL") from None
