"""Event streams in a database: one writer thread, one commit for many callers.

What only one kind of database needs stands in `sqlite` and `postgres`; the SQL here is understood
by both.
"""

import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, Engine, func, insert, select, tuple_
from sqlalchemy.exc import DBAPIError

from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.store.schema import EVENTS, demand_writer, migrate
from flplatform.store.targets import open_database

log = logging.getLogger(__name__)

MAX_GROUP = 1000
"""How many appends share one commit at most."""
CHUNK = 500
"""How many rows a reader holds beside those it returns, and how many one query asks for by key."""
LOCK_WAIT_S = 5.0
"""How long an opening waits for the session of a server that has just ended."""
RECONNECT_S = 60.0
CLOSE_S = 10.0
"""How long a store that is being closed goes on looking for a lost database."""
PAUSES_S = (0.05, 1.0)
"""First and longest pause between two attempts to connect or to lock."""
OPENING_PAUSES_S = (0.25, 5.0)
"""First and longest pause between two attempts to open a database; each is logged."""


Admit = Callable[[str, str, bool], None]
"""(what messages call a log, its id, whether it is empty): raises if it is not the one wanted."""


@dataclass(frozen=True, slots=True)
class _Append:
    rows: tuple[Row, ...]
    future: "Future[None]" = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one transaction is to do: why appends are left out, the others' rows, the new heads."""

    refusals: list[FLError | None]
    rows: list[Row]
    heads: dict[str, int]


class SqlStateStore:
    """`ports.StateStore` over SQLAlchemy, in SQLite or PostgreSQL.

    Args:
        target: path of a SQLite file, made if missing, or a database URL.
        on_fatal: called once, in the writer thread, when a write failed for another reason than
            want of space, a lost database did not come back in time, or another server has become
            its writer. What is on disk is then unknown: it should end the process.
        reconnect_s: how long a lost connection to the database may stay lost.
        opening_s: how long to wait for a database that is away; a file is not waited for.
        origin: the id that the log is to carry from now on; empty for its own.
        admit: asked before anything is changed in the database; what it raises, the opening raises.

    Attributes:
        name: what messages call the database; never holds a password.
        origin: the id of the log, random; whatever copies the log whole copies it too.
        trouble: why nothing can be written now, while the database is away; else "".
        committed: called in the writer thread with the last row of each commit, before anybody
            hears of it; it must not raise.

    Raises:
        ConfigError: the URL is malformed, its database not supported, or set up to lose events.
        FailedPreconditionError: another process has the database open, or a newer release wrote it.
        DataLossError: the database is damaged.
        UnavailableError: it cannot be opened.
    """

    def __init__(
        self,
        target: str | Path,
        on_fatal: Callable[[BaseException], None],
        reconnect_s: float = RECONNECT_S,
        opening_s: float = 0.0,
        origin: str = "",
        admit: Admit = lambda _name, _origin, _is_empty: None,
    ) -> None:
        self.trouble = ""
        self.origin = origin
        self.committed: Callable[[Row], None] = lambda _row: None
        self._admit_log = admit
        self._on_fatal = on_fatal
        self._reconnect_s = reconnect_s
        self._token = secrets.token_hex(16)
        self._failure: BaseException | None = None
        self._closed = False
        self._closing_until = math.inf
        self._entry = threading.Lock()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._heads: dict[str, int] = {}
        with ExitStack() as closing:
            self._database = open_database(target, closing)
            self.name = self._database.name
            self._engine: Engine = self._database.engine
            closing.callback(self._engine.dispose)
            self._connection = self._opened(opening_s if self._database.remote else 0.0)
            closing.callback(lambda: self._connection.close())
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
            select(*EVENTS.c)
            .where(EVENTS.c.stream == stream, EVENTS.c.seq > after)
            .order_by(EVENTS.c.seq)
        )
        with self._reading() as connection:
            found = connection.execution_options(yield_per=CHUNK).execute(query)
            return [Row(*row) for row in found]

    def streams(self, prefix: str = "") -> list[str]:
        """Return the names of all streams that start with `prefix`, sorted.

        Raises:
            UnavailableError: the store has failed or is closed.
            DataLossError: the database is damaged.
        """
        start = func.substr(EVENTS.c.stream, 1, len(prefix))
        query = select(EVENTS.c.stream).where(EVENTS.c.seq == 1, start == prefix)
        with self._reading() as connection:
            return sorted(connection.scalars(query))

    def extents(self) -> dict[str, tuple[int, int]]:
        """Return how many rows each stream has, and its highest seq: the same if none is lost.

        Raises:
            UnavailableError: the store has failed or is closed.
            DataLossError: the database is damaged.
        """
        stream, seq = EVENTS.c.stream, EVENTS.c.seq
        query = select(stream, func.count(), func.max(seq)).group_by(stream)
        with self._reading() as connection:
            return {str(name): (count, last) for name, count, last in connection.execute(query)}

    def close(self) -> None:
        """Write what was accepted, then release the database. Not to be called by `on_fatal`."""
        with self._entry:
            if not self._closed:
                self._closed = True
                self._closing_until = time.monotonic() + CLOSE_S
                self._queue.put(None)
        self._writer.join()
        self._closing.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        if self._failure is not None:
            raise _refusal(self._failure)
        if self._closed:
            raise UnavailableError("the state store is closed")
        if self.trouble:  # who reads may not wait until that is found out again
            raise UnavailableError(self.trouble)
        with self._database.explained(), self._engine.connect() as connection:
            yield connection

    def _opened(self, wait_s: float) -> Connection:
        """Return the writer's connection, to a database that is locked and up to date."""
        until = time.monotonic() + wait_s
        pause, longest = OPENING_PAUSES_S
        while True:
            try:
                with self._database.explained():
                    return self._open()
            except UnavailableError as error:
                left = until - time.monotonic()
                if left <= 0:
                    raise
                log.warning("waits for its state store, at most %.0f s more: %s", left, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)

    def _open(self) -> Connection:
        connection = self._database.connect()
        try:
            self._lock(connection)
            with connection.begin():
                origin = migrate(connection, self.name, self._token, self.origin)
                is_empty = connection.scalar(select(EVENTS.c.seq).limit(1)) is None
                self._admit_log(self.name, origin, is_empty)
            self.origin = origin
        except BaseException:
            connection.close()
            raise
        return connection

    def _lock(self, connection: Connection) -> None:
        until = time.monotonic() + LOCK_WAIT_S
        while holder := self._database.try_lock(connection):
            if time.monotonic() > until:
                raise FailedPreconditionError(
                    f"{self._database.name} is in use by {holder}",
                    hint="one server at a time may work on a state store",
                    rule="one_writer",
                )
            time.sleep(PAUSES_S[0])

    def _run(self) -> None:
        group: list[_Append] = []
        last = False
        while not last:
            try:
                append = self._queue.get(timeout=self._database.ping_s)
                while append is not None:
                    group.append(append)
                    if len(group) == MAX_GROUP or self._queue.empty():
                        break
                    append = self._queue.get()
                last = append is None
            except queue.Empty:
                pass  # an empty group still has the connection and the ownership checked
            try:
                if self._failure is None and (group or not last):
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
            undone = self._database.refusal(error)
            if undone is None:
                raise
            if len(group) == 1:
                group[0].future.set_exception(undone)
            else:
                for append in group:
                    self._write([append])
            return
        for append, refusal in zip(group, refusals, strict=True):
            if refusal is None:
                append.future.set_result(None)
            else:
                append.future.set_exception(refusal)

    def _commit(self, group: list[_Append]) -> list[FLError | None]:
        """Return, for each append of one committed transaction, why it was left out, if it was.

        Where the connection breaks before the outcome is known, the database is asked for it.
        """
        plan: _Plan | None = None
        until = 0.0
        while True:
            try:
                with self._connection.begin():
                    demand_writer(self._connection, self._database.name, self._token)
                    if plan is None:
                        plan = self._plan(group)
                        stored = not plan.rows
                    else:
                        stored = self._are_stored(plan.rows)
                    if not stored:
                        self._connection.execute(insert(EVENTS), [asdict(row) for row in plan.rows])
                break
            except DBAPIError as error:
                if not self._database.lost(error):
                    raise
                until = until or time.monotonic() + self._reconnect_s
                self._reconnect(error, until)
        self._heads.update(plan.heads)
        if plan.rows:
            self.committed(plan.rows[-1])
        return plan.refusals

    def _reconnect(self, cause: DBAPIError, until: float) -> None:
        """Connect and lock anew, and see to it that nothing acknowledged is missing.

        Raises:
            UnavailableError: that was not possible before `until`.
            FailedPreconditionError: another server has become the writer.
            DataLossError: the database that came back is older than the one that was lost.
        """
        name = self._database.name
        what = " ".join(str(cause.orig).split())
        since = datetime.now(UTC).strftime("%FT%TZ")
        self.trouble = f"{name} is away since {since}: {what}"
        log.warning("%s: the connection is lost: %s", name, what)
        if time.monotonic() > until:  # connections can be made, and nothing more
            raise UnavailableError(f"not reached again in time: {name}: {what}")
        pause, longest = PAUSES_S
        while True:
            self._connection.close()
            try:
                with self._database.explained():
                    self._connection = self._database.connect()
                    with self._connection.begin():  # what is left of us may still hold the token
                        demand_writer(self._connection, name, self._token, hold=False)
                    if holder := self._database.try_lock(self._connection):
                        raise UnavailableError(f"{name} is locked by {holder}")
                    self._check_heads()
                log.warning("%s: connected again", name)
                self.trouble = ""
                return
            except UnavailableError as error:
                if time.monotonic() + pause > min(until, self._closing_until):
                    raise UnavailableError(f"not reached again in time: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _check_heads(self) -> None:
        heads = iter([head for head in self._heads.items() if head[1] > 0])
        key = tuple_(EVENTS.c.stream, EVENTS.c.seq)
        with self._connection.begin():
            while chunk := list(islice(heads, CHUNK)):
                query = select(func.count()).select_from(EVENTS).where(key.in_(chunk))
                if self._connection.scalar(query) != len(chunk):
                    raise DataLossError(
                        f"{self._database.name} has lost events that were acknowledged",
                        hint="it may be a standby that was behind when it took over",
                    )

    def _are_stored(self, rows: Sequence[Row]) -> bool:
        """Return whether a transaction of unknown outcome is there.

        Raises:
            DataLossError: something else is there.
        """
        remaining = iter(rows)
        key = tuple_(EVENTS.c.stream, EVENTS.c.seq)
        found: set[Row] = set()
        while chunk := list(islice(remaining, CHUNK)):
            query = select(*EVENTS.c).where(key.in_([(row.stream, row.seq) for row in chunk]))
            found.update(Row(*row) for row in self._connection.execute(query))
        if found and found != set(rows):
            raise DataLossError(
                f"{self._database.name} holds events that this server did not write"
            )
        return bool(found)

    def _plan(self, group: list[_Append]) -> _Plan:
        heads: dict[str, int] = {}
        refusals = [self._admit(append.rows, heads) for append in group]
        rows = [
            row
            for append, refusal in zip(group, refusals, strict=True)
            if refusal is None
            for row in append.rows
        ]
        return _Plan(refusals, rows, heads)

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
            query = select(func.max(EVENTS.c.seq)).where(EVENTS.c.stream == stream)
            self._heads[stream] = self._connection.scalar(query) or 0
        return self._heads[stream]


def _refusal(failure: BaseException | None) -> UnavailableError:
    return UnavailableError(
        f"the state store has failed: {failure}", hint="see the server's log, then restart it"
    )
