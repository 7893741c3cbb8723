"""What a database must offer so that the state store can stand on it."""

from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from flplatform.core.errors import ResourceExhaustedError


class Database(Protocol):
    """One kind of database.

    Attributes:
        name: what messages call it; never holds a password.
        engine: readers' connections.
        ping_s: how long the writer's connection may lie idle until it is looked after; None: any.
        remote: whether it may be away and come back; a file does not.
    """

    name: str
    engine: Engine
    ping_s: float | None
    remote: bool

    def connect(self) -> Connection:
        """Return a new connection for the writer, to a database that keeps what it acknowledges.

        Raises:
            ConfigError: the database is set up in a way that loses or changes events.
            UnavailableError: it cannot be written now.
        """

    def try_lock(self, connection: Connection) -> str:
        """Shut out other servers while `connection` lasts; return who is in the way, or ""."""

    def lost(self, error: DBAPIError) -> bool:
        """Return whether the connection broke: what it did last may or may not have happened."""

    def refusal(self, error: DBAPIError) -> ResourceExhaustedError | None:
        """Return what to answer if a write was undone for what may pass, as a full disk."""

    def explained(self) -> AbstractContextManager[None]:
        """Translate the driver's errors.

        Raises:
            ConfigError: the database refuses what the URL asks for.
            DataLossError: the database is damaged.
            UnavailableError: anything else.
        """
