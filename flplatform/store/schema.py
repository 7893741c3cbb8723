"""The tables of the state store, how they come to be, and whose they are."""

import secrets
from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    String,
    column,
    delete,
    insert,
    inspect,
    select,
    table,
    text,
    update,
)

from flplatform.core.errors import DataLossError, FailedPreconditionError

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
    "CREATE TABLE writer (token VARCHAR NOT NULL)",
    "CREATE TABLE origin (id VARCHAR NOT NULL)",
)
"""Step n leads from schema n to n + 1, in any database; a released step is never edited."""
WITH_ORIGIN = 3
"""The first schema whose log carries an id, which the state folder beside it carries too."""

EVENTS = table(
    "events",
    column("stream", String),
    column("seq", Integer),
    column("time", String),
    column("type", String),
    column("version", Integer),
    column("body", String),
)
_SCHEMA = table("schema_version", column("version", Integer))
_WRITER = table("writer", column("token", String))
_ORIGIN = table("origin", column("id", String))


def read_version(connection: Connection, name: str) -> int | None:
    """Return the version of the schema; None for a database without one.

    Raises:
        FailedPreconditionError: a newer release wrote the database.
        DataLossError: its version is lost.
    """
    if not inspect(connection).has_table(_SCHEMA.name):
        return None
    found: Any = connection.scalars(select(_SCHEMA.c.version)).all()
    if len(found) != 1 or not isinstance(found[0], int) or found[0] < 0:
        raise DataLossError(
            f"{name} does not say which schema it has", hint="restore it from a backup"
        )
    version: int = found[0]
    if version > len(STEPS):
        raise FailedPreconditionError(
            f"{name} has schema {version}; this release knows schemas up to {len(STEPS)}",
            hint="use the newer release that wrote it",
        )
    return version


def read_origin(connection: Connection) -> str:
    """Return the id of a log; empty if it carries none: no release that gives one has opened it."""
    if not inspect(connection).has_table(_ORIGIN.name):
        return ""
    found: Any = connection.scalars(select(_ORIGIN.c.id)).all()
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def migrate(connection: Connection, name: str, token: str, origin: str = "") -> str:
    """Bring the schema up to this release, make `token` the writer's, and return the log's id.

    Args:
        connection: in a transaction.
        name: what messages call the database.
        token: of the writer.
        origin: the id that the log is to carry: that of the log whose copy it is to be. Empty for
            its own, which it is given when it has none yet.

    Raises:
        FailedPreconditionError: a newer release wrote the database.
        DataLossError: its version or its id is lost.
    """
    version = read_version(connection, name)
    if version is None:
        connection.execute(text("CREATE TABLE schema_version (version INTEGER NOT NULL)"))
        connection.execute(insert(_SCHEMA).values(version=0))
        version = 0
    for step in STEPS[version:]:
        connection.execute(text(step))
    if version < len(STEPS):
        connection.execute(update(_SCHEMA).values(version=len(STEPS)))
    if version < WITH_ORIGIN:
        connection.execute(insert(_ORIGIN).values(id=origin or secrets.token_hex(16)))
    elif origin:
        connection.execute(update(_ORIGIN).values(id=origin))
    connection.execute(delete(_WRITER))
    connection.execute(insert(_WRITER).values(token=token))
    if not (found := read_origin(connection)):
        raise DataLossError(f"{name} has lost its id", hint="restore it from a backup")
    return found


def demand_writer(connection: Connection, name: str, token: str, *, hold: bool = True) -> None:
    """See to it that `token` is the writer's; `hold` keeps it so until the transaction ends.

    Raises:
        FailedPreconditionError: another server has become the writer.
    """
    query = select(_WRITER.c.token)
    if connection.scalars(query.with_for_update() if hold else query).all() != [token]:
        raise FailedPreconditionError(
            f"another server has opened {name} in the meantime",
            hint="one server at a time may work on a state store",
            rule="one_writer",
        )
