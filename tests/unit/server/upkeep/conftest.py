"""A server's state as a server leaves it, made once; every test gets a copy to spoil."""

import asyncio
import base64
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.ports import Row
from flplatform.security.audit import AuditLog, KitSeal
from flplatform.security.signing import StartOrder, sign_order
from flplatform.server.upkeep.log_id import LOG_ID
from flplatform.server.upkeep.place import Place
from flplatform.store.state import SqlStateStore
from tests.support.federation import Federation, provision
from tests.unit.server.scene import Scene, play, until

ROUNDS = 3


async def _work(scene: Scene) -> None:
    """Run 1 finishes after three rounds; run 2 is in its second."""
    scene.obeying("a", "b")
    optimizer = {"name": "fedadam"}
    for run in (1, 2):
        await scene.submit(("a", "b"), rounds=ROUNDS, keep_updates="all", optimizer=optimizer)
        for number in range(1, ROUNDS + 1):
            for site, value in (("a", 1.0), ("b", 3.0)):
                if (run, number, site) == (2, 2, "b"):
                    await asyncio.sleep(0)
                    await scene.close()
                    return

                def open_now(site: str = site, number: int = number, run: int = run) -> bool:
                    tasks = [task.id for task in scene.runs.tasks.of(site)]
                    return any((task.run, task.round) == (run, number) for task in tasks)

                await until(open_now)
                await scene.do(site, value * number + run)
        await scene.ended(run)


def _ordered(row: Row, federation: Federation) -> Row:
    """Have an admin sign for the opening of a run, as a server demands it."""
    if row.type != ev.RunOpened.__name__:
        return row
    body = json.loads(row.body)
    now = datetime.now(UTC)
    order = StartOrder(
        project=federation.open("admin").identity.project,
        issued_at=now,
        not_after=now + timedelta(hours=1),
        submission_id=body["submission_id"],
        job_digest=body["job_blob"]["digest"].partition(":")[2],
        sites=tuple(body["sites"]),
    )
    signed = sign_order(order, federation.key("admin"), federation.open("admin").chain)
    body["order"] = base64.b64encode(signed.to_bytes()).decode()
    return replace(row, body=json.dumps(body))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit of a server with two runs."""
    folder = tmp_path_factory.mktemp("upkeep")
    federation = provision(folder, ("a", "b"))
    kit = federation.open("server")
    state = kit.state_folder()
    state.mkdir(mode=0o700)
    with ThreadPoolExecutor(2) as workers:
        scene = Scene(state, workers)
        play(_work(scene))
    with closing(SqlStateStore(state / "events.db", lambda _error: None)) as store:
        for stream in scene.store.streams():
            store.append([_ordered(row, federation) for row in scene.store.read(stream)]).result()
        (state / LOG_ID).touch(0o600)
        (state / LOG_ID).write_text(f"{store.origin}\n")
    audit = AuditLog(state / "audit.jsonl", "server", seal=KitSeal(kit))
    for number in range(5):
        audit.record({"name": "lead"}, f"command {number}", "allowed")
    audit.close()
    (state / "users.json").write_text("{}")
    (state / "users.json").chmod(0o600)
    (state / "metrics").mkdir(mode=0o700)
    (state / "metrics" / "run-1.jsonl").touch(0o600)
    return federation.server


@pytest.fixture
def kit(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "kit")


@pytest.fixture
def place(kit: Path) -> Place:
    """Its state."""
    return Place.of(kit)


@pytest.fixture
def sql(kit: Path) -> Callable[..., None]:
    """Changes the log behind everybody's back."""

    def change(*statements: str) -> None:
        with closing(sqlite3.connect(kit / "state" / "events.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return change


@pytest.fixture(autouse=True)
def _private() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)
