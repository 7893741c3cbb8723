"""The state in PostgreSQL: it goes away in the middle of a run, the server too; nothing changes."""

import pytest

from flplatform.core import events as ev
from tests.scenarios.conftest import Running
from tests.support.postgres import Cluster

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]


def keep_state_in(cluster: Cluster, running: Running) -> None:
    """Have the server keep its state in a schema of its own, and look for events there."""
    schema = cluster.new_schema()
    running.local(
        "server", "resources.yml", f"reserve_bytes: 0\nstate_url: {cluster.url(schema)}\n"
    )

    def events(run: int) -> list[ev.Event]:
        query = f"SELECT type, version, body FROM events WHERE stream = 'run/{run}' ORDER BY seq"
        rows = cluster.execute(query, schema=schema)
        return [ev.decode(*row, where=f"run/{run}") for row in rows]

    running.events = events  # type: ignore[method-assign]


def test_a_run_survives_its_database_and_its_server(federation, postgres: Cluster):
    running = federation("site-1", "site-2")
    keep_state_in(postgres, running)
    running.start_all()
    running.steps_job("calm", rounds=3)
    running.steps_job("disturbed", rounds=3)
    done = running.console("submit_job calm --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = running.hold("site-1", 2), running.hold("site-1", 3)
    done = running.console("submit_job disturbed")
    assert done.returncode == 0, done.stdout + done.stderr

    running.wait_event(2, ev.UpdateAccepted, round=2, site="site-2")
    process = running.processes["server"]
    postgres.crash()
    first()
    running.wait_event(2, ev.UpdateAccepted, round=3, site="site-2")
    assert process.poll() is None, "a restart of the database must not end the server"

    before = running.events(2)
    try:
        postgres.stop("immediate")
        lost = running.output("server", 1000).count("the connection is lost")
        second()
        running.wait_for(
            lambda: running.output("server", 1000).count("the connection is lost") > lost,
            "the server to miss its database",
            "server",
        )
        running.kill("server")
    finally:
        postgres.start()
    running.start("server")
    assert running.wait_event(2, ev.RunEnded).status == "finished"
    assert running.events(2)[: len(before)] == before
    assert running.final_digest(2) == running.final_digest(1)
    accepted = [e.task_id for e in running.events(2) if isinstance(e, ev.UpdateAccepted)]
    assert len(accepted) == len(set(accepted)) == 6
    assert not (running.kit("server") / "state" / "events.db").exists()
