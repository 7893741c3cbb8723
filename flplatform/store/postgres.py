"""The state store in a PostgreSQL database, by psycopg 3.

One session, the writer's, holds an advisory lock for as long as it lasts. PostgreSQL ends a
session's transaction before it lets go of the session's lock: whoever has the lock again after a
broken connection sees what became of the transaction that was under way.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    ResourceExhaustedError,
    UnavailableError,
)

T = TypeVar("T")

DRIVER = "postgresql+psycopg"
OLDEST_VERSION = 13
PING_S = 10.0
LOCK_TIMEOUT_S = 10.0
"""How long a statement may wait for somebody who works on the tables."""
STATEMENT_TIMEOUT_S = 12.0
"""How long PostgreSQL may work on one of the writer's statements until it undoes it itself."""
SILENCE_S = 15.0
"""How long the writer hears nothing until it takes a database for lost: one that is frozen keeps
its connections, and its kernel answers for it. Longer than what PostgreSQL ends by itself."""
READ_SILENCE_S = 10.0
"""The same for readers."""
READERS = 4
"""Readers' connections that are kept open; more are made when they are needed."""

SETTINGS = {
    "server_encoding": (("UTF8",), "create the database with ENCODING 'UTF8'"),
    "client_encoding": (("UTF8",), "take client_encoding out of state_url"),
    "fsync": (("on",), "set fsync = on in postgresql.conf"),
    "synchronous_commit": (
        ("on", "remote_apply"),
        "set synchronous_commit = on for this role and database, or take it out of state_url",
    ),
    "transaction_isolation": (
        ("read committed",),
        "set default_transaction_isolation = 'read committed' for this role and database",
    ),
}
"""What a database must be set to: setting → values that will do, and how to get there."""

UNDONE = {
    "25006": "database",  # read_only_sql_transaction: some hosts set this when their disk is full
    "40001": "database",  # serialization_failure
    "40P01": "database",  # deadlock_detected
    "53100": "disk",  # disk_full
    "53200": "database",  # out_of_memory
    "53400": "database",  # configuration_limit_exceeded, as temp_file_limit
    "55P03": "database",  # lock_not_available
    "57014": "database",  # query_canceled: by statement_timeout or by an administrator
}
"""SQLSTATEs of transactions that PostgreSQL has rolled back and that may pass later → the rule."""

ENDING = ("08", "57P")
"""SQLSTATEs of a connection that ends: lost, shut down, crashed, terminated."""
DAMAGED = ("XX001", "XX002")
_LOCK_CLASS = 0x464C5053
"""High half of the advisory lock's key; the low half is the oid of the schema."""

_MINE = text(
    "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()",
)
_HOLDER = text(
    """SELECT a.pid, a.backend_start::text, a.application_name,
        coalesce(a.client_addr::text, 'local')
    FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.classid = CAST(:high AS bigint)::oid AND l.objid = CAST(:low AS bigint)::oid"""
)


class PostgresDatabase:
    """A PostgreSQL database, or a schema of one, that one server at a time writes.

    Args:
        url: of the backend postgresql; its query holds libpq's parameters.
        read_silence_s: how long readers hear nothing until they give up; `READ_SILENCE_S` if None.

    Raises:
        ConfigError: the URL asks for another driver, or psycopg is not installed.
    """

    ping_s: float | None = PING_S
    remote = True

    def __init__(self, url: URL, read_silence_s: float | None = None) -> None:
        self._password = url.password or str(url.query.get("password", ""))
        self.name = _name(url)
        if url.drivername not in ("postgresql", DRIVER):
            raise ConfigError(
                f"state_url: {url.drivername} is not supported", hint=f"begin it with {DRIVER}://"
            )
        if "@" in (url.host or ""):  # it is half of the password: it must not be shown
            raise ConfigError("state_url: the host holds an @", hint="write %40 in a password")
        url = url.set(drivername=DRIVER)
        self._writers = self._engine(url, SILENCE_S, STATEMENT_TIMEOUT_S, poolclass=NullPool)
        self.engine = self._engine(
            url,
            READ_SILENCE_S if read_silence_s is None else read_silence_s,
            0.0,
            pool_size=READERS,
            pool_pre_ping=True,
        )
        self._session: tuple[int, str] | None = None

    @staticmethod
    def _engine(url: URL, silence_s: float, statement_timeout_s: float, **pool: Any) -> Engine:
        try:
            engine = create_engine(url, hide_parameters=True, connect_args=_defaults(url), **pool)
        except ImportError as error:  # the driver, or the libpq that it needs
            what = " ".join(str(error).split())
            raise ConfigError(
                f"state_url: PostgreSQL needs psycopg, which cannot be loaded: {what}",
                hint="pip install 'flplatform[postgres]'",
            ) from None
        limits = {
            "lock_timeout": min(LOCK_TIMEOUT_S, 0.8 * silence_s),
            "statement_timeout": statement_timeout_s,
        }

        def set_limits(connection: Any, _record: object) -> None:
            for name, seconds in limits.items():
                connection.execute(f"SET {name} = {round(seconds * 1000)}")
            connection.commit()

        event.listen(engine, "do_connect", _connecting(silence_s))
        event.listen(engine, "connect", set_limits)
        return engine

    def connect(self) -> Connection:
        """Return a new checked session for the writer; see `database.Database`.

        Raises:
            ConfigError: a setting loses or changes events, or the version is too old.
            UnavailableError: the database is a standby.
        """
        connection = self._writers.connect()
        try:
            with connection.begin():
                self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: Connection) -> None:
        version = int(str(connection.scalar(text("SHOW server_version_num")))) // 10000
        if version < OLDEST_VERSION:
            raise ConfigError(
                f"{self.name} is PostgreSQL {version}", hint=f"{OLDEST_VERSION} is the oldest"
            )
        for setting, (wanted, hint) in SETTINGS.items():
            found = connection.scalar(text(f"SHOW {setting}"))
            if found not in wanted:
                raise ConfigError(
                    f"{self.name}: {setting} is {found!r}, not {wanted[0]!r}", hint=hint
                )
        if connection.scalar(text("SELECT current_schema()")) is None:
            raise ConfigError(
                f"{self.name}: search_path names no schema of the database",
                hint="create the schema, or grant USAGE on it",
            )
        if connection.scalar(text("SELECT pg_is_in_recovery()")):
            raise UnavailableError(f"{self.name} is a standby: it cannot be written")

    def try_lock(self, connection: Connection) -> str:
        """Take the session's advisory lock; return who has it, or "".

        What is left of a former session of ours, its connection broken, is ended.
        """
        with connection.begin():
            schema: Any = connection.scalar(
                text("SELECT CAST(oid AS bigint) FROM pg_namespace WHERE nspname=current_schema()")
            )
            key = (_LOCK_CLASS << 32) + schema
            if connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
                pid, start = connection.execute(_MINE).one()
                self._session = (pid, start)
                return ""
            holder = connection.execute(_HOLDER, {"high": _LOCK_CLASS, "low": schema}).first()
            if holder is None:  # it has ended since
                return "another server"
            pid, start, application, address = holder
            if (pid, start) == self._session:
                connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        return f"session {pid} ({application or 'unnamed'}, {address}, since {start})"

    def lost(self, error: DBAPIError) -> bool:
        """Return whether the connection broke; see `database.Database`."""
        # The server's last word may be read before the end of the connection is; what the driver
        # then says of a batch that it cannot finish has no SQLSTATE: all of the server's have one.
        state = _sqlstate(error)
        own_error = not state and type(error.orig).__name__ == "OperationalError"
        return error.connection_invalidated or state.startswith(ENDING) or own_error

    def refusal(self, error: DBAPIError) -> ResourceExhaustedError | None:
        """Return what to answer if PostgreSQL undid a transaction; see `database.Database`."""
        rule = UNDONE.get(_sqlstate(error))
        if rule is None or self.lost(error):
            return None
        return ResourceExhaustedError(f"{self.name}: {self._words(error)}", rule=rule)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Translate the driver's errors; see `database.Database`.

        Raises:
            ConfigError: a parameter of the URL is unknown, or the role lacks a permission.
            DataLossError: the database is damaged.
            UnavailableError: anything else.
        """
        try:
            yield
        except DBAPIError as error:
            state = _sqlstate(error)
            words = f"{self.name}: {self._words(error)}"
            if state in DAMAGED:
                raise DataLossError(words, hint="restore it from a backup") from error
            if state == "42501":  # insufficient_privilege
                raise ConfigError(
                    words, hint="docs/operating.md names the permissions that the role needs"
                ) from error
            if not state and type(error.orig).__name__ == "ProgrammingError":
                raise ConfigError(words, hint="correct state_url") from error
            raise UnavailableError(words) from error

    def _words(self, error: DBAPIError) -> str:
        words = " ".join(str(error.orig).split())
        return words.replace(self._password, "***") if self._password else words


def _connecting(silence_s: float) -> Callable[..., Any]:
    """Return what makes connections that close when they have heard nothing for so long."""
    import psycopg  # noqa: PLC0415 - who keeps the state in a file need not have it

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
            return super().wait(heard(self, gen), *args, **kwargs)

    def heard(connection: Connection, steps: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """Pass on what the driver waits for; it is resumed several times a second."""
        until = time.monotonic() + silence_s
        try:
            wanted = next(steps)
            while True:
                ready = yield wanted
                if ready:
                    until = time.monotonic() + silence_s
                elif time.monotonic() > until:
                    connection.close()
                    raise psycopg.OperationalError(f"has said nothing for {silence_s:g} s")
                wanted = steps.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def connect(_dialect: object, _record: object, args: Any, parameters: Any) -> Connection:
        return Connection.connect(*args, **parameters)

    return connect


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def _hosts(url: URL) -> list[str]:
    """Return the hosts that libpq will try; none if that is left to its environment."""
    given = url.query.get("host", ()) if url.host is None else url.host
    listed = given.split(",") if isinstance(given, str) else given
    return [host.rpartition(":")[0] or host if url.host is None else host for host in listed]


def _name(url: URL) -> str:
    host = ",".join(_hosts(url)) or os.environ.get("PGHOST", "local socket")
    port = f":{url.port}" if url.port else ""
    user = f"{url.username}@" if url.username else ""
    return f"PostgreSQL {user}{host}{port}/{url.database or url.username or ''}"


def _is_here(host: str) -> bool:
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _defaults(url: URL) -> dict[str, Any]:
    """Return libpq parameters that `url` does not give: a dead peer is noticed, TLS is checked."""
    defaults: dict[str, Any] = {
        "application_name": f"flplatform {socket.gethostname()} {os.getpid()}",
        "client_encoding": "utf8",
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": 10_000,
    }
    hosts = _hosts(url) or [os.environ.get("PGHOST", "")]
    if "PGSSLMODE" not in os.environ and not all(_is_here(host) for host in hosts):
        defaults["sslmode"] = "verify-full"
    return {key: value for key, value in defaults.items() if key not in url.query}
