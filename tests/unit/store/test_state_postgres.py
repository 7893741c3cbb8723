"""The state store in PostgreSQL: settings, locks, broken connections, crashes, secrets."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import make_url

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.store import postgres as dialect
from flplatform.store import state
from flplatform.store.state import SqlStateStore
from tests.support.postgres import OWNER, Cluster, CommitCutter

DEADLINE_S = 50.0


def never(error: BaseException) -> None:
    raise AssertionError(f"fatal: {error}")


def row(seq: int, stream: str = "s", body: str = "{}") -> Row:
    return Row(stream, seq, "t", "Type", 1, body)


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def opened(
    url: str, on_fatal: Any = never, reconnect_s: float = DEADLINE_S, opening_s: float = 0.0
) -> Iterator[Any]:
    store = SqlStateStore(url, on_fatal, reconnect_s, opening_s)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def schema(postgres: Cluster) -> str:
    return postgres.new_schema()


@pytest.fixture
def cutter(postgres: Cluster) -> Iterator[CommitCutter]:
    made = CommitCutter(postgres)
    yield made
    made.close()


# ---- what is accepted at opening ----


def test_rows_survive_a_restart_of_both(postgres: Cluster, schema: str) -> None:
    with opened(postgres.url(schema)) as store:
        store.append([row(1), row(2)]).result(DEADLINE_S)
    postgres.crash()
    plain = postgres.url(schema).replace("postgresql+psycopg:", "postgresql:")
    with opened(plain) as store:
        store.append([row(3)]).result(DEADLINE_S)
        assert [r.seq for r in store.read("s")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("synchronous_commit=off", "synchronous_commit is 'off', not 'on'; set sync"),
        ("synchronous_commit=local", "synchronous_commit is 'local'"),
        ("default_transaction_isolation=serializable", "set default_transaction_isolation"),
        ("search_path=absent", "search_path names no schema"),
    ],
)
def test_settings_that_lose_events_are_refused_by_name(
    postgres: Cluster, schema: str, options: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SqlStateStore(f"{postgres.url(schema)}%20-c{options}", never)


def test_other_encodings_are_refused(postgres: Cluster) -> None:
    with contextlib.suppress(Exception):
        postgres.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(ConfigError, match="server_encoding is 'SQL_ASCII', not 'UTF8'; create"):
        SqlStateStore(postgres.url().replace(f"/{OWNER}?", "/ascii?"), never)
    with pytest.raises(ConfigError, match="client_encoding is 'LATIN1', not 'UTF8'"):
        SqlStateStore(postgres.url(client_encoding="latin1"), never)


def test_a_server_without_fsync_and_a_standby_are_refused(postgres: Cluster, schema: str) -> None:
    standby = postgres.folder / "data" / "standby.signal"
    try:
        postgres.stop()
        postgres.start("fsync=off")
        with pytest.raises(ConfigError, match="fsync is 'off', not 'on'"):
            SqlStateStore(postgres.url(schema), never)
        postgres.stop()
        standby.touch()
        postgres.start()
        with pytest.raises(UnavailableError, match="is a standby"):
            SqlStateStore(postgres.url(schema), never)
    finally:
        standby.unlink(missing_ok=True)
        postgres.stop()
        postgres.start()


def test_an_old_version_is_refused(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "OLDEST_VERSION", 99)
    with pytest.raises(ConfigError, match=r"is PostgreSQL \d\d; 99 is the oldest"):
        SqlStateStore(postgres.url(schema), never)


def test_a_newer_schema_is_refused_by_name_and_left_alone(postgres: Cluster, schema: str) -> None:
    with opened(postgres.url(schema)) as store:
        store.append([row(1)]).result(DEADLINE_S)
    postgres.execute("UPDATE schema_version SET version = 7", schema=schema)
    with pytest.raises(FailedPreconditionError, match="schema 7; this release knows"):
        SqlStateStore(postgres.url(schema), never)
    assert postgres.execute("SELECT version FROM schema_version", schema=schema) == [(7,)]


def test_sqlite_needs_no_driver_and_its_absence_is_explained(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from flplatform.store.state import SqlStateStore\n"
        "SqlStateStore(sys.argv[1], print).close()\n"
        "assert 'psycopg' not in sys.modules\n"
        "sys.modules['psycopg'] = None\n"
        "try:\n    SqlStateStore('postgresql://host/database', print)\n"
        "except Exception as error:\n    print(f'{type(error).__name__}: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/state.db"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ConfigError: state_url: PostgreSQL needs psycopg")
    assert "pip install 'flplatform[postgres]'" in done.stdout


@pytest.mark.parametrize(
    ("url", "mode"),
    [
        ("postgresql://db.example.org/state", "verify-full"),
        ("postgresql:///state?host=/run,db.example.org", "verify-full"),
        ("postgresql://10.1.2.3/state?sslmode=verify-ca", None),
        ("postgresql://localhost/state", None),
        ("postgresql://127.0.0.1/state", None),
        ("postgresql://[::1]/state", None),
        ("postgresql:///state?host=/run/postgresql", None),
    ],
)
def test_a_server_elsewhere_must_prove_who_it_is(
    url: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGSSLMODE", raising=False)
    monkeypatch.delenv("PGHOST", raising=False)
    assert dialect._defaults(make_url(url)).get("sslmode") == mode


# ---- permissions and secrets ----

SECRET = "pa55-w0rd"


def guard(cluster: Cluster, schema: str, role: str) -> None:
    with contextlib.suppress(Exception):
        cluster.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    cluster.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")


def test_the_role_needs_only_what_the_documentation_says(
    postgres: Cluster, schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard(postgres, schema, "guarded")
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:guarded:{SECRET}\n")
    passfile.chmod(0o600)
    with pytest.raises(ConfigError, match="permission denied.*names the permissions"):
        SqlStateStore(postgres.url(schema, user="guarded", passfile=str(passfile)), never)
    postgres.execute(f"GRANT CREATE ON SCHEMA {schema} TO guarded")
    with opened(postgres.url(schema, user="guarded", passfile=str(passfile))) as store:
        store.append([row(1)]).result(DEADLINE_S)
    postgres.execute(f"REVOKE CREATE ON SCHEMA {schema} FROM guarded")
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    with opened(postgres.url(schema, user="guarded")) as store:  # the tables are there
        store.append([row(2)]).result(DEADLINE_S)
        postgres.cut(schema)
        store.append([row(3)]).result(DEADLINE_S)


def test_no_text_shows_the_password(
    postgres: Cluster,
    schema: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "LOCK_WAIT_S", 0.1)
    caplog.set_level(logging.DEBUG)
    guard(postgres, schema, "guarded2")
    postgres.execute(f"GRANT CREATE ON SCHEMA {schema} TO guarded2")
    host, good = str(postgres.folder), postgres.url(schema, user=f"guarded2:{SECRET}")
    with opened(good) as store:
        store.append([row(1)]).result(DEADLINE_S)
        postgres.cut(schema)
        store.append([row(2)]).result(DEADLINE_S)
        with pytest.raises(FailedPreconditionError, match="in use by session") as refused:
            SqlStateStore(good, never)
        assert SECRET not in str(refused.value)
    assert "the connection is lost" in caplog.text
    for url in (
        f"postgresql://guarded2:{SECRET}x@/{OWNER}?host={host}",
        f"postgresql://guarded2@/{OWNER}?host={host}&password={SECRET}x",
        f"postgresql://u:{SECRET}@/db?host=/nowhere",
        f"postgresql://u:{SECRET}@/db?no_such_parameter={SECRET}",
        f"postgresql://u:x@{SECRET}@localhost/db",
        f"postgresql://u:{SECRET}@localhost:port/db",
        f"postgresql+asyncpg://u:{SECRET}@localhost/db",
        f"postgres://u:{SECRET}@localhost/db",
        f"mysql://u:{SECRET}@localhost/db",
        f"host=localhost password={SECRET} dbname=db",
        f"/home/{SECRET}/state.db",
        f"sqlite:///home/{SECRET}/state.db",
        f"sqlite://u:{SECRET}@localhost//home/state.db",
    ):
        with pytest.raises((ConfigError, UnavailableError)) as found:
            SqlStateStore(url, never)
        text = "".join(traceback.format_exception(found.value))
        assert SECRET not in text.replace(f'"{url}"', ""), url
    assert SECRET not in caplog.text


# ---- one server at a time ----


def test_a_second_store_is_refused_by_name(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LOCK_WAIT_S", 0.1)
    with opened(postgres.url(schema)) as store, opened(postgres.url(postgres.new_schema())):
        with pytest.raises(
            FailedPreconditionError,
            match=rf"in use by session \d+ \(flplatform .* {os.getpid()}, local, since .*rule",
        ):
            SqlStateStore(postgres.url(schema), never)
        store.append([row(1)]).result(DEADLINE_S)
    with opened(postgres.url(schema)) as store:
        store.append([row(2)]).result(DEADLINE_S)


@pytest.mark.parametrize("idle", [False, True])
def test_a_server_whose_place_was_taken_ends(
    postgres: Cluster, schema: str, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect.PostgresDatabase, "ping_s", 0.05 if idle else None)
    fatal: list[BaseException] = []
    cutter = CommitCutter(postgres)
    with opened(postgres.url(schema, folder=cutter.folder), fatal.append) as first:
        first.append([row(1)]).result(DEADLINE_S)
        cutter.refusing = True
        wait_for(lambda: postgres.cut(schema), "the first session to be ended")
        with opened(postgres.url(schema)) as second:
            second.append([row(2)]).result(DEADLINE_S)
            cutter.refusing = False
            if not idle:
                with pytest.raises(UnavailableError, match="another server has opened"):
                    first.append([row(2)]).result(DEADLINE_S)
            wait_for(lambda: fatal, "the first to notice")
            second.append([row(3)]).result(DEADLINE_S)
            assert [r.seq for r in second.read("s")] == [1, 2, 3]
    assert isinstance(fatal[0], FailedPreconditionError)
    assert len(fatal) == 1
    cutter.close()


def test_a_writer_that_lost_its_lock_unseen_cannot_write(postgres: Cluster, schema: str) -> None:
    fatal: list[BaseException] = []
    with opened(postgres.url(schema), fatal.append) as store:
        store.append([row(1)]).result(DEADLINE_S)
        postgres.execute("UPDATE writer SET token = 'another'", schema=schema)
        with pytest.raises(UnavailableError, match="another server has opened"):
            store.append([row(2)]).result(DEADLINE_S)
    assert len(fatal) == 1
    assert postgres.execute("SELECT max(seq) FROM events", schema=schema) == [(1,)]


# ---- broken connections ----


@pytest.mark.parametrize("moment", ["before", "after", "ghost", "silent_before", "silent_after"])
def test_an_unknown_outcome_is_found_out(
    postgres: Cluster,
    schema: str,
    cutter: CommitCutter,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialect, "SILENCE_S", 0.5)
    url = postgres.url(schema, folder=cutter.folder)
    with opened(url, opening_s=DEADLINE_S) as store:  # the machine, too, may be silent so long
        store.append([row(1)]).result(DEADLINE_S)
        for number in range(1, 4):
            setattr(cutter, moment, True)
            first = store.append([row(2 * number), row(number, "t", "Zürich 🚀")])
            second = store.append([row(2 * number + 1)])
            assert first.result(DEADLINE_S) is None
            assert second.result(DEADLINE_S) is None
            assert cutter.cuts == number
        assert [r.seq for r in store.read("s")] == list(range(1, 8))
        assert [r.seq for r in store.read("t")] == [1, 2, 3]


def test_a_session_that_ends_within_an_append_is_a_broken_connection(
    postgres: Cluster, schema: str, cutter: CommitCutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver hides what ended the session behind an error of its own."""
    monkeypatch.setattr(dialect, "SILENCE_S", 0.5)
    url = postgres.url(schema, folder=cutter.folder)
    with opened(url, opening_s=DEADLINE_S) as store:  # the machine, too, may be silent so long
        cutter.within = schema
        rows = [row(seq) for seq in range(1, 9)]
        store.append(rows).result(DEADLINE_S)
        assert cutter.cuts == 1
        assert store.read("s") == rows


def test_a_refusal_stays_one_when_the_connection_breaks(
    postgres: Cluster, schema: str, cutter: CommitCutter
) -> None:
    with opened(postgres.url(schema, folder=cutter.folder)) as store:
        cutter.after = True
        outcomes = [store.append([row(seq)]) for seq in (1, 3, 2)]
        kinds = [type(outcome.exception(DEADLINE_S)).__name__ for outcome in outcomes]
        assert kinds == ["NoneType", "AlreadyExistsError", "NoneType"]
        assert cutter.cuts == 1
        assert [r.seq for r in store.read("s")] == [1, 2]


def test_foreign_rows_in_place_of_ours_are_fatal(
    postgres: Cluster, schema: str, cutter: CommitCutter
) -> None:
    fatal: list[BaseException] = []
    with opened(postgres.url(schema, folder=cutter.folder), fatal.append) as store:
        cutter.before = cutter.refusing = True
        pending = store.append([row(1)])
        wait_for(lambda: cutter.cuts, "the cut")
        foreign = "INSERT INTO events VALUES ('s', 1, 't', 'Type', 1, 'other')"
        wait_for(lambda: postgres.cut(schema) == 0, "the session to end")
        postgres.execute(foreign, schema=schema)
        cutter.refusing = False
        with pytest.raises(UnavailableError, match="has failed"):
            pending.result(DEADLINE_S)
    assert isinstance(fatal[0], DataLossError)


def test_acknowledged_events_that_are_gone_are_fatal(postgres: Cluster, schema: str) -> None:
    fatal: list[BaseException] = []
    with opened(postgres.url(schema), fatal.append) as store:
        store.append([row(1), row(2)]).result(DEADLINE_S)
        postgres.execute("DELETE FROM events WHERE seq = 2", schema=schema)
        postgres.cut(schema)
        with pytest.raises(UnavailableError, match="has lost events that were acknowledged"):
            store.append([row(1, "t")]).result(DEADLINE_S)
    assert isinstance(fatal[0], DataLossError)


def test_beyond_the_deadline_it_is_fatal(
    postgres: Cluster, schema: str, cutter: CommitCutter
) -> None:
    fatal: list[BaseException] = []
    with opened(postgres.url(schema, folder=cutter.folder), fatal.append, 0.3) as store:
        store.append([row(1)]).result(DEADLINE_S)
        cutter.refusing = cutter.before = True
        with pytest.raises(UnavailableError, match="not reached again in time"):
            store.append([row(2)]).result(DEADLINE_S)
        with pytest.raises(UnavailableError, match="has failed"):
            store.read("s")
    assert len(fatal) == 1
    assert postgres.execute("SELECT max(seq) FROM events", schema=schema) == [(1,)]


def test_closing_waits_for_a_lost_database_only_a_moment(
    postgres: Cluster, schema: str, cutter: CommitCutter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "CLOSE_S", 0.2)
    fatal: list[BaseException] = []
    with opened(postgres.url(schema, folder=cutter.folder), fatal.append, 600) as store:
        cutter.refusing = cutter.before = True
        pending = store.append([row(1)])
        wait_for(lambda: cutter.cuts, "the cut")
    assert isinstance(pending.exception(0), UnavailableError)
    assert len(fatal) == 1


def test_a_frozen_database_is_one_that_is_away(
    postgres: Cluster,
    schema: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dialect, "SILENCE_S", 0.5)
    monkeypatch.setattr(dialect, "READ_SILENCE_S", 2.0)
    with opened(postgres.url(schema, connect_timeout="2"), opening_s=DEADLINE_S) as store:
        store.append([row(1)]).result(DEADLINE_S)
        assert len(store.read("s")) == 1
        with postgres.frozen():
            with pytest.raises(UnavailableError, match="PostgreSQL"):
                store.read("s")
            assert store.trouble == ""
            pending = store.append([row(2)])
            wait_for(lambda: store.trouble, "the writer to notice")
            assert "is away since 20" in store.trouble
            assert "has said nothing for 0.5 s" in store.trouble
            with monkeypatch.context() as patch:  # nobody waits again for what is known
                patch.setattr(store._engine, "connect", threading.Event().wait)
                with pytest.raises(UnavailableError, match="is away since"):
                    store.read("s")
            assert not pending.done()
        assert pending.result(DEADLINE_S) is None
        assert store.trouble == ""
        assert [r.seq for r in store.read("s")] == [1, 2]
    assert f"{store._database.name}: the connection is lost" in caplog.text
    assert f"{store._database.name}: connected again" in caplog.text


def test_an_idle_store_notices_a_frozen_database(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "SILENCE_S", 0.3)
    monkeypatch.setattr(dialect.PostgresDatabase, "ping_s", 0.1)
    with opened(postgres.url(schema), opening_s=DEADLINE_S) as store:
        with postgres.frozen():
            wait_for(lambda: store.trouble, "the writer to notice")
        wait_for(lambda: not store.trouble, "the writer to come back")
        store.append([row(1)]).result(DEADLINE_S)


def append_on(store: SqlStateStore) -> None:
    for seq in range(2, 10_000):
        store.append([row(seq)]).result(DEADLINE_S)


def test_a_database_that_never_commits_is_fatal_in_time(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without the standby that a synchronous commit waits for: connecting works."""
    monkeypatch.setattr(dialect, "SILENCE_S", 0.3)
    fatal: list[BaseException] = []
    with opened(postgres.url(schema), fatal.append, 3.0, DEADLINE_S) as store:
        store.append([row(1)]).result(DEADLINE_S)
        try:
            postgres.execute("ALTER SYSTEM SET synchronous_standby_names = 'absent'")
            postgres.execute("SELECT pg_reload_conf()")
            with pytest.raises(UnavailableError, match="not reached again in time"):
                append_on(store)  # PostgreSQL takes the setting in when it gets to it
        finally:
            postgres.execute("ALTER SYSTEM RESET synchronous_standby_names")
            postgres.execute("SELECT pg_reload_conf()")
    assert len(fatal) == 1


def test_a_slow_statement_is_undone_and_refused(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "STATEMENT_TIMEOUT_S", 2.0)
    with opened(postgres.url(schema)) as store:
        postgres.execute(
            "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$; "
            "CREATE TRIGGER doze BEFORE INSERT ON events EXECUTE FUNCTION doze()",
            schema=schema,
        )
        with pytest.raises(ResourceExhaustedError, match="statement timeout"):
            store.append([row(1)]).result(DEADLINE_S)
        postgres.execute("DROP FUNCTION doze CASCADE", schema=schema)
        store.append([row(1)]).result(DEADLINE_S)


# ---- a database that is away at the opening ----


def test_an_opening_waits_for_its_database(
    postgres: Cluster, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    def tries() -> list[str]:
        return [each for each in caplog.messages if each.startswith("waits for its state store")]

    postgres.stop()
    with ThreadPoolExecutor(1) as pool:
        try:
            opening = pool.submit(SqlStateStore, postgres.url(schema), never, opening_s=DEADLINE_S)
            wait_for(lambda: len(tries()) >= 2, "two attempts")
        finally:
            postgres.start()
        store = opening.result(DEADLINE_S)
    store.append([row(1)]).result(DEADLINE_S)
    store.close()
    assert f"s more: {store._database.name}: " in tries()[0]


def test_an_opening_waits_for_a_bounded_time_and_not_for_what_waiting_cannot_change(
    postgres: Cluster, schema: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    nowhere = "postgresql:///state?host=/nowhere"
    with pytest.raises(UnavailableError, match="nowhere"):
        SqlStateStore(nowhere, never, opening_s=0.6)
    assert 0.6 <= time.monotonic() - began < 30
    with opened(postgres.url(schema)):
        pass
    postgres.execute("UPDATE schema_version SET version = 7", schema=schema)
    began = time.monotonic()
    with pytest.raises(FailedPreconditionError, match="schema 7"):
        SqlStateStore(postgres.url(schema), never, opening_s=600)
    (tmp_path / "state.db").mkdir()
    with pytest.raises((UnavailableError, OSError)):
        SqlStateStore(tmp_path / "state.db", never, opening_s=600)
    assert time.monotonic() - began < 50


def test_readers_survive_a_restart(postgres: Cluster, schema: str) -> None:
    with opened(postgres.url(schema)) as store:
        store.append([row(1)]).result(DEADLINE_S)
        assert len(store.read("s")) == 1
        postgres.crash()
        assert len(store.read("s")) == 1
        postgres.stop("immediate")
        with pytest.raises(UnavailableError, match="connection"):
            store.read("s")
        postgres.start()
        assert len(store.read("s")) == 1
        store.append([row(2)]).result(DEADLINE_S)


def test_rows_are_read_in_portions(postgres: Cluster, schema: str) -> None:
    with opened(postgres.url(schema)) as store:
        rows = [row(seq, body="x" * 100) for seq in range(1, 2 * state.CHUNK + 2)]
        store.append(rows).result(DEADLINE_S)
        cursors: list[str] = []

        def note(_connection: Any, cursor: Any, *_rest: Any) -> None:
            cursors.append(type(cursor).__name__)

        event.listen(store._engine, "before_cursor_execute", note)
        assert store.read("s") == rows
        assert cursors == ["ServerCursor"]


# ---- what PostgreSQL undoes ----


@pytest.mark.parametrize(
    ("code", "rule"), [("53100", "disk"), ("40001", "database"), ("57014", "database")]
)
def test_what_was_undone_is_refused_and_the_store_lives_on(
    postgres: Cluster, schema: str, code: str, rule: str
) -> None:
    with opened(postgres.url(schema)) as store:
        store.append([row(1)]).result(DEADLINE_S)
        postgres.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.seq = 3 "
            f"THEN RAISE EXCEPTION 'undone' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$; "
            "CREATE TRIGGER refuse BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION refuse()",
            schema=schema,
        )
        store.append([row(2)]).result(DEADLINE_S)
        with pytest.raises(ResourceExhaustedError, match="undone") as refused:
            store.append([row(3), row(1, "t")]).result(DEADLINE_S)
        assert refused.value.rule == rule
        assert store.streams() == ["s"]
        postgres.execute("DROP FUNCTION refuse CASCADE", schema=schema)
        store.append([row(3), row(1, "t")]).result(DEADLINE_S)


def test_somebody_who_works_on_the_table_is_not_waited_for_long(
    postgres: Cluster, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "LOCK_TIMEOUT_S", 1.0)
    with opened(postgres.url(schema)) as store, postgres.connect(schema=schema) as other:
        store.append([row(1)]).result(DEADLINE_S)
        with other.transaction():
            other.execute("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(ResourceExhaustedError, match="lock timeout"):
                store.append([row(2)]).result(DEADLINE_S)
            with pytest.raises(UnavailableError, match="lock timeout"):
                store.read("s")
        store.append([row(2)]).result(DEADLINE_S)
        assert len(store.read("s")) == 2


def test_a_full_disk_refuses_and_recovers(postgres: Cluster, schema: str) -> None:
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    small = postgres.folder / "small"
    script = (
        f"mount -t tmpfs -o size=2m,mode=700,uid=$(id -u postgres) none {small} && "
        'exec setpriv --pdeathsig QUIT --reuid postgres --regid postgres --init-groups "$@"'
    )
    small.mkdir()
    postgres.stop()
    postgres.start(prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    try:
        postgres.execute(f"CREATE TABLESPACE small LOCATION '{small}'")
        with opened(postgres.url(schema)) as store:
            postgres.execute("ALTER TABLE events SET TABLESPACE small", schema=schema)
            postgres.execute("ALTER TABLE events ALTER body SET STORAGE PLAIN", schema=schema)
            postgres.execute(
                "CREATE TABLE ballast TABLESPACE small AS "
                "SELECT repeat(md5(n::text), 100) FROM generate_series(1, 100) n", schema=schema,
            )  # fmt: skip
            stored, refused = 0, 0
            while refused < 5:
                futures = [store.append([row(stored + n, body="x" * 3000)]) for n in (1, 2, 3)]
                done = [future.exception(DEADLINE_S) for future in futures]
                stored += sum(error is None for error in done)
                refused += isinstance(done[0], ResourceExhaustedError)
                assert len(store.read("s")) == stored
            assert stored > 50
            postgres.execute("DROP TABLE ballast", schema=schema)
            store.append([row(stored + 1, body="x" * 3000)]).result(DEADLINE_S)
            assert [r.seq for r in store.read("s")] == list(range(1, stored + 2))
        postgres.execute(f"DROP SCHEMA {schema} CASCADE")
        postgres.execute("DROP TABLESPACE small")
    finally:
        postgres.stop()
        postgres.start()


# ---- crashes ----

CRASHES = st.lists(
    st.tuples(st.sampled_from(["cut", "immediate", "kill"]), st.integers(0, 40)),
    min_size=1, max_size=3,
)  # fmt: skip


@pytest.mark.timeout(300)
@settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(crashes=CRASHES, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_every_append_happens_once_through_crashes(
    crashes: list[tuple[str, int]], sizes: list[int], postgres: Cluster
) -> None:
    schema = postgres.new_schema()
    acknowledged: dict[str, list[Row]] = {f"run/{n}": [] for n in range(3)}
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(stream: str, store: SqlStateStore) -> None:
        mine = acknowledged[stream]
        for size in itertools.cycle(sizes):
            if stop.is_set():
                return
            rows = [row(len(mine) + n, stream, os.urandom(8).hex()) for n in range(1, size + 1)]
            try:
                store.append(rows).result(60)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)
                return
            mine += rows

    with pytest.MonkeyPatch.context() as patch, opened(postgres.url(schema)) as store:
        patch.setattr(state, "PAUSES_S", (0.02, 0.1))
        threads = [threading.Thread(target=work, args=(name, store)) for name in acknowledged]
        for thread in threads:
            thread.start()
        for kind, pause_ms in crashes:
            count = sum(map(len, acknowledged.values()))
            wait_for(lambda: sum(map(len, acknowledged.values())) > count or failures, "appends")  # noqa: B023
            time.sleep(pause_ms / 1000)  # the instant of the crash is the case under test
            if kind == "cut":
                postgres.cut(schema)
            else:
                postgres.crash(kind)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        for stream, rows in acknowledged.items():
            assert store.read(stream) == rows
    with opened(postgres.url(schema)) as store:
        for stream, rows in acknowledged.items():
            assert store.read(stream) == rows
