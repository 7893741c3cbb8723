"""The tables of the state store, how they come to be, and whose they are."""

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

from flplatform.core.errors import FailedPreconditionError

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
)
"""Step n leads from schema n to n + 1, in any database; a released step is never edited."""

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


def migrate(connection: Connection, name: str, token: str) -> None:
    """Bring the schema up to this release and make `token` the writer's, in one transaction.

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
        connection.execute(delete(_WRITER))
        connection.execute(insert(_WRITER).values(token=token))


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
