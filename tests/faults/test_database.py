"""A PostgreSQL that freezes, that is away when the server starts, and that commits no more."""

import time

import psutil
import pytest

from flplatform.core import events as ev
from flplatform.entrypoints.process import EXIT_FAILED, EXIT_STOPPED
from flplatform.server.server import FATAL_EXIT
from tests.faults.conftest import LONG
from tests.scenarios.test_why import Talk
from tests.support.postgres import Cluster

pytestmark = pytest.mark.timeout(300)
SITES = ("site-1", "site-2") if LONG else ("site-1",)
AWAY = "is away since"
SILENCE_S = "1"
"""What tests wait for; the program is more patient, see `flplatform.store.postgres`."""


@pytest.fixture
def on_postgres(faulty, postgres: Cluster):
    """Make federations whose server keeps its state in a schema of its own."""

    def make(*sites, reconnect_s=60.0, **limits):
        federation = faulty(*sites, **limits)
        schema = postgres.new_schema()
        url = postgres.url(schema, connect_timeout="2")
        text = f"reserve_bytes: 0\nstate_url: {url}\nstate_reconnect_s: {reconnect_s}\n"
        federation.local("server", "resources.yml", text)
        federation.variables["server"] = {"FLP_FAULTS_SILENCE": SILENCE_S}
        federation.schema = schema

        def stream(name):
            query = f"SELECT type, version, body FROM events WHERE stream = '{name}' ORDER BY seq"
            return [ev.decode(*row, where=name) for row in postgres.execute(query, schema=schema)]

        federation.stream = stream
        return federation

    return make


def says(federation, text: str, count: int = 1) -> None:
    federation.wait_for(
        lambda: federation.log_text("server").count(text) >= count, f"the server to say {text!r}"
    )


def held_in_round_2(federation):
    """Return a run whose second round waits for one site, and what lets it go on."""
    federation.start_all()
    let_go = federation.hold(federation.sites[0], 2)
    run = federation.submit("disturbed", rounds=3)
    for site in federation.sites[1:]:
        federation.wait_event(run, ev.UpdateAccepted, round=2, site=site)
    return run, let_go


def go_on(federation, run: int) -> None:
    federation.wait_event(run, ev.RunEnded)
    federation.tally.recovered()
    if not LONG:
        federation.check(run)
        return
    federation.check_against_calm(run, rounds=3)


def test_frozen_in_the_middle_of_a_run(on_postgres, postgres: Cluster):
    federation = on_postgres(*SITES)
    run, let_go = held_in_round_2(federation)
    console = Talk(federation)
    try:
        assert console.ask("check_status server")["rows"][0]["status"] == "ok"
        with postgres.frozen():
            federation.tally.fault("PostgreSQL frozen")
            let_go()
            says(federation, "the connection is lost: has said nothing for 1 s")
            asked = time.monotonic()
            row = console.ask("check_status server")["rows"][0]
            assert time.monotonic() - asked < 15, "operators need not wait for the database"
            assert row["status"] == "error", row
            assert row["detail"].startswith("PostgreSQL flplatform@"), row
            assert AWAY in row["detail"], row
            assert not federation.ended("server")
        says(federation, "connected again")
        assert console.ask("check_status server")["rows"][0]["status"] == "ok"
    finally:
        console.close()
    go_on(federation, run)


@pytest.mark.faults_long
def test_only_the_writers_session_frozen(on_postgres, postgres: Cluster):
    """Connections can be made; the lock is let go when the frozen session has ended."""
    federation = on_postgres("site-1", "site-2")
    run, let_go = held_in_round_2(federation)
    holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    session = psutil.Process(postgres.execute(holder)[0][0])
    session.suspend()
    try:
        federation.tally.fault("PostgreSQL session frozen")
        let_go()
        says(federation, "the connection is lost: has said nothing for 1 s")
        time.sleep(3)  # nothing may come of several tries: there is no event to wait for
        assert federation.log_text("server").count("connected again") == 0
        assert not federation.ended("server")
    finally:
        session.resume()
    says(federation, "connected again")
    go_on(federation, run)


@pytest.mark.faults_long
def test_frozen_longer_than_the_server_waits(on_postgres, postgres: Cluster):
    """It ends with what it has acknowledged, and goes on from there."""
    federation = on_postgres("site-1", "site-2", reconnect_s=2.0)
    run, let_go = held_in_round_2(federation)
    with postgres.frozen():
        federation.tally.fault("PostgreSQL frozen for long")
        let_go()
        process = federation.processes.pop("server")
        assert process.wait(timeout=60) == FATAL_EXIT
        assert "not reached again in time" in federation.log_text("server")
        federation._spawn("server")  # as its supervisor does
        assert federation.processes.pop("server").wait(timeout=60) == EXIT_FAILED
    federation.start("server")
    go_on(federation, run)


WAITS = "waits for its state store, at most"


def test_away_at_the_start(on_postgres, postgres: Cluster):
    """It is waited for; whoever stops the server meanwhile need not wait."""
    federation = on_postgres("site-1", reconnect_s=600.0)
    postgres.stop()
    try:
        federation.tally.fault("PostgreSQL away at the start", 2)
        federation._spawn("server")
        says(federation, WAITS, 2)
        asked = time.monotonic()
        assert federation.terminate("server") == EXIT_STOPPED
        assert time.monotonic() - asked < 50
        before = federation.log_text("server").count(WAITS)
        federation._spawn("server")
        says(federation, WAITS, before + 1)
    finally:
        postgres.start()
    federation.wait_ready("server")
    federation.tally.recovered()


@pytest.mark.faults_long
def test_away_at_the_start_for_long(on_postgres, postgres: Cluster):
    federation = on_postgres("site-1", reconnect_s=1.0)
    postgres.stop()
    try:
        federation.tally.fault("PostgreSQL away at the start")
        federation._spawn("server")
        assert federation.processes.pop("server").wait(timeout=60) == EXIT_FAILED
    finally:
        postgres.start()
    assert f"{WAITS} 1 s more: PostgreSQL flplatform@" in federation.log_text("server")
    assert "cannot start: PostgreSQL flplatform@" in federation.log_text("server")
