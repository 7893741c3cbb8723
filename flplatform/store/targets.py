"""What `state_url` may name, and whether a server could work on it."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from sqlalchemy import insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from flplatform.core.errors import ConfigError, FailedPreconditionError
from flplatform.store.database import Database
from flplatform.store.postgres import PostgresDatabase
from flplatform.store.schema import EVENTS, migrate
from flplatform.store.sqlite import SqliteFile

URL_HINT = "use sqlite:////path/to/file or postgresql+psycopg://user@host/database"


def demand_url(target: str | Path) -> URL:
    """Return the URL of a log.

    Args:
        target: path of a SQLite file, or a database URL, as `state_url`. A file that a URL names
            has its whole path: the server and its tools need not run in the same folder.

    Raises:
        ConfigError: a text is no such URL; nothing of it is shown, for it may hold a password.
    """
    if isinstance(target, Path):
        return URL.create("sqlite", database=str(target))
    try:
        url = make_url(target)
    except (ArgumentError, ValueError):  # their texts may hold the URL
        raise ConfigError("state_url is not a database URL", hint=URL_HINT) from None
    named = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    if named and (url.host or url.username or not Path(url.database or "").is_absolute()):
        raise ConfigError("state_url: the path of a SQLite file is not absolute", hint=URL_HINT)
    return url


def open_database(target: str | Path, closing: ExitStack) -> Database:
    """Return what stands behind a target; its lock, if it has one, ends with `closing`.

    Raises:
        ConfigError: the URL is malformed, or its database not supported.
        FLError: it cannot be opened; see `SqliteFile` and `PostgresDatabase`.
    """
    url = demand_url(target)
    match url.get_backend_name():
        case "sqlite":
            return SqliteFile(url, closing)
        case "postgresql":
            return PostgresDatabase(url)
        case other:
            raise ConfigError(f"state_url: no state can be kept in {other}", hint=URL_HINT)


def demand_writable(target: str | Path) -> None:
    """Do in a database elsewhere what a server does at its start and with an event, and undo it.

    Raises:
        ConfigError: the role lacks a permission, or the database is set up to lose events.
        FailedPreconditionError: a server works on it, or a newer release wrote it.
        DataLossError: it is damaged.
        UnavailableError: it cannot be reached or written.
    """
    with _rehearsing(target) as database, closing(database.connect()) as connection:
        if holder := database.try_lock(connection):
            raise FailedPreconditionError(
                f"{database.name} is in use by {holder}", hint="stop it first", rule="one_writer"
            )
        with connection.begin() as transaction:
            migrate(connection, database.name, secrets.token_hex(16))
            row = {"stream": "", "seq": 1, "time": "", "type": "", "version": 1, "body": ""}
            connection.execute(insert(EVENTS).values(row))
            transaction.rollback()


@contextmanager
def _rehearsing(target: str | Path) -> Iterator[Database]:
    with ExitStack() as stack:
        database = open_database(target, stack)
        stack.callback(database.engine.dispose)
        stack.enter_context(database.explained())
        yield database
