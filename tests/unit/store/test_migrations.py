"""A kill in the middle of a migration leaves the old schema or the new one, and every row."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flplatform.core.ports import Row
from flplatform.store import schema
from flplatform.store.state import SqlStateStore
from tests.support.postgres import Cluster

STEPS = ("CREATE TABLE extra (a INTEGER)", "CREATE TABLE more (a INTEGER)")

MIGRATION = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from flplatform.store import schema
from flplatform.store.state import SqlStateStore

target, at, *steps = sys.argv[1:]
schema.STEPS += tuple(steps)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

@event.listens_for(Engine, "before_cursor_execute")
def before(connection, cursor, statement, *rest):
    if statement.startswith(at):
        kill()

@event.listens_for(Engine, "commit")
def before_commit(connection):
    if at == "COMMIT":
        kill()

SqlStateStore(target, lambda error: sys.exit(str(error))).close()
"""


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.db"
    cluster: Cluster = request.getfixturevalue("postgres")
    return cluster.url(cluster.new_schema())


def migrate(target: str, at: str = "") -> int:
    """Open a store with a release that knows more steps; return the exit status."""
    command = [sys.executable, "-c", MIGRATION, target, at or "never", *STEPS]
    return subprocess.run(command, check=False, timeout=60).returncode


def never(error: BaseException) -> None:
    raise AssertionError(f"fatal: {error}")


def rows_of(target: str) -> list[int]:
    store = SqlStateStore(target, never)
    try:
        return [row.seq for row in store.read("s")]
    finally:
        store.close()


def test_a_kill_leaves_the_old_schema_or_the_new_one(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqlStateStore(target, never)
    store.append([Row("s", 1, "t", "Type", 1, "{}")]).result(10)
    store.close()
    for at in ("CREATE TABLE extra", "CREATE TABLE more", "UPDATE schema_version", "COMMIT"):
        assert migrate(target, at) == -signal.SIGKILL, at
        assert rows_of(target) == [1], "the release of before still works on it"
    assert migrate(target) == os.EX_OK
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, *STEPS))
    assert rows_of(target) == [1]
