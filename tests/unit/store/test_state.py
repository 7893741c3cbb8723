"""The state store in SQLite: files, locks, schema, full disks; and kills, in any database."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from flplatform.core.errors import (
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.files.shortage import shortage_in
from flplatform.store import schema, sqlite, state
from flplatform.store.snapshot import snapshot
from flplatform.store.sqlite import SqliteFile
from flplatform.store.state import SqlStateStore
from tests.support.postgres import Cluster


def never(error: BaseException) -> None:
    raise AssertionError(f"fatal: {error}")


def row(seq: int, stream: str = "s", body: str = "{}") -> Row:
    return Row(stream, seq, "t", "Type", 1, body)


@contextlib.contextmanager
def opened(target: Path | str) -> Iterator[SqlStateStore]:
    store = SqlStateStore(target, never)
    try:
        yield store
    finally:
        store.close()


def test_rows_survive_a_restart_and_go_on_from_there(tmp_path: Path) -> None:
    with opened(tmp_path / "deep" / "state.db") as store:
        store.append([row(1), row(2)]).result(60)
    with opened(f"sqlite:///{tmp_path}/deep/state.db") as store:
        store.append([row(3)]).result(60)
        assert [r.seq for r in store.read("s")] == [1, 2, 3]


def test_the_files_are_private_durable_and_in_wal_mode(tmp_path: Path) -> None:
    with opened(tmp_path / "state.db") as store:
        store.append([row(1)]).result(60)
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        connection = store._connection.connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


def test_a_second_store_on_one_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with opened(path):
        with pytest.raises(FailedPreconditionError, match=f"in use by process {os.getpid()}"):
            SqlStateStore(path, never)
        code = (
            "import sys\n"
            "from flplatform.store.state import SqlStateStore\n"
            "try:\n    SqlStateStore(sys.argv[1], print)\n"
            "except Exception as error:\n    sys.exit(f'{type(error).__name__}: {error}')\n"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, f"sqlite:///{path}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.stderr.startswith("FailedPreconditionError: ")
        assert f"in use by process {os.getpid()}" in second.stderr
    with opened(path):
        pass


def test_a_newer_schema_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with opened(path) as store:
        store.append([row(1)]).result(60)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 7")
    connection.close()
    with pytest.raises(FailedPreconditionError, match="schema 7; this release knows .* up to 3"):
        SqlStateStore(path, never)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(7,)]
    connection.close()


def test_a_migration_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    with opened(path) as store:
        store.append([row(1)]).result(60)
    added = "CREATE TABLE extra (a INTEGER)"
    steps = schema.STEPS
    monkeypatch.setattr(schema, "STEPS", (*steps, added, "CREATE NONSENSE"))
    with pytest.raises(UnavailableError, match="NONSENSE"):
        SqlStateStore(path, never)
    monkeypatch.setattr(schema, "STEPS", (*steps, added))
    with opened(path) as store:
        assert [r.seq for r in store.read("s")] == [1]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(4,)]
        assert connection.execute("SELECT * FROM extra").fetchall() == []
    connection.close()


def test_a_log_has_an_id_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the release before gets its id when this release opens it first."""
    with monkeypatch.context() as before:
        before.setattr(schema, "STEPS", schema.STEPS[:2])
        before.setattr(schema, "WITH_ORIGIN", 0)
        before.setattr(schema, "read_origin", lambda _connection: "none")
        with opened(tmp_path / "old.db") as store:
            store.append([row(1)]).result(60)
    with snapshot(tmp_path / "old.db") as log:
        assert log.origin == ""
    with opened(tmp_path / "old.db") as store, opened(tmp_path / "other.db") as other:
        known = store.origin
        assert re.fullmatch("[0-9a-f]{32}", known)
        assert other.origin != known
    with opened(tmp_path / "old.db") as store:
        assert store.origin == known
        assert [r.seq for r in store.read("s")] == [1]
    with snapshot(tmp_path / "old.db") as log:
        assert log.origin == known
        log.copy(tmp_path / "copy.db")
    with opened(tmp_path / "copy.db") as copy:
        assert copy.origin == known
    with sqlite3.connect(tmp_path / "copy.db") as connection:
        connection.execute("DELETE FROM origin")
    connection.close()
    with pytest.raises(DataLossError, match="has lost its id; restore it from a backup"):
        SqlStateStore(tmp_path / "copy.db", never)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with opened(path) as store:
        store.append([row(n, body="x" * 1000) for n in range(1, 50)]).result(60)
    data = bytearray(path.read_bytes())
    data[8192:16384] = os.urandom(8192)
    path.write_bytes(data)
    with pytest.raises(DataLossError, match="state.db is damaged"):
        SqlStateStore(path, never)
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(DataLossError, match="state.db is damaged"):
        SqlStateStore(path, never)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mysql://host/database", "no state can be kept in mysql"),
        ("postgresql+psycopg2://host/database", r"postgresql\+psycopg2 is not supported"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("://", "not a database URL"),
        ("host=db password=x", "state_url is not a database URL; use sqlite:////path"),
        ("/tmp/state.db", "state_url is not a database URL; use sqlite:////path"),
        ("sqlite:///state.db", "the path of a SQLite file is not absolute; use sqlite:////path"),
        ("sqlite://host//tmp/state.db", "the path of a SQLite file is not absolute"),
    ],
)
def test_other_targets_are_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SqlStateStore(target, never)


def test_waiting_appends_share_a_commit_of_bounded_size(tmp_path: Path) -> None:
    with opened(tmp_path / "state.db") as store:
        commits: list[int] = []
        gate = threading.Event()

        def on_commit(_connection: object) -> None:
            gate.wait(60)
            commits.append(1)

        event.listen(store._engine, "commit", on_commit)
        futures = [store.append([row(seq)]) for seq in range(1, 2 * state.MAX_GROUP)]
        gate.set()
        for future in futures:
            future.result(60)
        assert 2 <= len(commits) <= 3  # what the writer met first, then full groups
        assert len(store.read("s")) == len(futures)


def test_readers_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    with opened(tmp_path / "state.db") as store:
        store.append([row(1)]).result(60)
        gate = threading.Event()
        event.listen(store._engine, "commit", lambda _: gate.wait(60) and None)
        pending = store.append([row(2)])
        assert [r.seq for r in store.read("s")] == [1]
        assert not pending.done()
        gate.set()
        pending.result(60)


WRITER = """
import sys
from flplatform.core.ports import Row
from flplatform.store.state import SqlStateStore

store = SqlStateStore(sys.argv[1], lambda error: sys.exit(str(error)))
heads = [len(store.read(f"run/{n}")) for n in range(3)]
while True:
    futures = []
    for n in range(3):
        rows = [Row(f"run/{n}", heads[n] + i, "t", "T", 1, "x" * 500) for i in (1, 2)]
        heads[n] += 2
        futures.append((f"{n} {heads[n]}", store.append(rows)))
    for text, future in futures:
        future.result()
        print(text, flush=True)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "rounds"), [("sqlite", 8), ("postgres", 4)])
def test_kill_9_loses_nothing_that_was_acknowledged(
    kind: str, rounds: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    target = f"sqlite:///{tmp_path}/state.db"
    crash: Callable[[], None] = lambda: None  # noqa: E731
    if kind == "postgres":
        cluster: Cluster = request.getfixturevalue("postgres")
        target, crash = cluster.url(cluster.new_schema()), cluster.crash
    acknowledged = {0: 0, 1: 0, 2: 0}
    for round_number in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(4):  # each stream has one behind the first line, which is not counted
            writer.stdout.readline()
        time.sleep(0.013 * round_number)
        if round_number % 2:
            crash()
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().splitlines():
            if len(parts := line.split()) == 2:
                acknowledged[int(parts[0])] = int(parts[1])
        writer.stdout.close()
        writer.wait()
        with opened(target) as store:
            for n, acknowledged_seq in acknowledged.items():
                seqs = [r.seq for r in store.read(f"run/{n}")]
                assert seqs == list(range(1, len(seqs) + 1))
                assert len(seqs) >= acknowledged_seq
                assert len(seqs) % 2 == 0  # an append is whole or absent
    assert min(acknowledged.values()) > 0


FILLER = """
import os, sys
from pathlib import Path
from flplatform.core.errors import ResourceExhaustedError
from flplatform.core.ports import Row
from flplatform.store.state import SqlStateStore

folder = Path(sys.argv[1])
ballast = folder / "ballast"
ballast.write_bytes(bytes(2_000_000))
fatal = []
store = SqlStateStore(folder / "state.db", fatal.append)
acknowledged = refused = seq = 0
while refused < 20:
    futures = [store.append([Row("s", seq + n, "t", "T", 1, "x" * 3000)]) for n in (1, 2, 3)]
    stored = [future.exception() is None for future in futures]
    acknowledged += sum(stored)
    seq += sum(stored)
    refused += not all(stored)
    assert isinstance(futures[0].exception(), (type(None), ResourceExhaustedError))
    assert len(store.read("s")) == acknowledged
ballast.unlink()
store.append([Row("s", seq + 1, "t", "T", 1, "x" * 3000)]).result()
store.close()
store = SqlStateStore(folder / "state.db", fatal.append)
assert [row.seq for row in store.read("s")] == list(range(1, acknowledged + 2))
store.close()
assert not fatal, fatal
print("stored", acknowledged)
"""


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", tmp_path, sys.executable, FILLER]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"]).returncode:
        pytest.skip("no user namespaces here: a small file system cannot be mounted")
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[1]) > 50


def test_a_disk_too_full_to_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "STEPS", (f"CREATE TABLE events (a TEXT DEFAULT '{'x' * 9000}')",))

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA max_page_count=1")

    monkeypatch.setattr(SqliteFile, "_on_connect", lambda _, c, r: limit(c, r))
    with pytest.raises((UnavailableError, ResourceExhaustedError), match="full"):
        SqlStateStore(tmp_path / "state.db", never)


def test_what_sqlite_does_not_name_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says the same of a file that cannot be opened for a quota as of one that is a folder."""
    (tmp_path / "state.db").mkdir()
    for number, rule in ((errno.EDQUOT, "disk"), (None, None)):
        found = OSError(number, "as found") if number else None
        monkeypatch.setattr(sqlite, "probe", lambda _folder, found=found: found)
        with pytest.raises(UnavailableError, match="unable to open") as caught:
            SqlStateStore(tmp_path / "state.db", never)
        short = shortage_in(caught.value)
        assert (short and short.rule) == rule
