"""The session to PostgreSQL breaks within the very transaction that closes a round."""

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.scenarios.test_postgres import keep_state_in
from tests.support.postgres import Cluster

pytestmark = pytest.mark.timeout(600 if LONG else 300)

ROUNDS = 3

BREAK = """
CREATE SEQUENCE {schema}.broken;
CREATE FUNCTION {schema}.break_off() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('{schema}.broken') <= {times} THEN
        PERFORM pg_terminate_backend(pg_backend_pid());
        PERFORM pg_sleep(5);
    END IF;
    RETURN NULL;
END $$;
"""
"""Sequences are not undone with a transaction: the session breaks so many times, and not again."""

WHEN = {
    "insert": "CREATE TRIGGER break_off AFTER INSERT ON {schema}.events FOR EACH ROW "
    "WHEN (NEW.type = 'RoundClosed') EXECUTE FUNCTION {schema}.break_off()",
    "commit": "CREATE CONSTRAINT TRIGGER break_off AFTER INSERT ON {schema}.events "
    "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "WHEN (NEW.type = 'RoundClosed') EXECUTE FUNCTION {schema}.break_off()",
}


@pytest.mark.parametrize("when", [pytest.param("insert", marks=pytest.mark.faults_long), "commit"])
def test_a_round_closes_once_though_the_session_breaks_in_it(
    faulty, postgres: Cluster, when: str
) -> None:
    federation = faulty("site-1", "site-2")
    keep_state_in(postgres, federation)
    federation.start_all()
    local = (federation.kit("server") / "local" / "resources.yml").read_text()
    schema = local.rpartition("search_path%3D")[2].strip()
    postgres.execute(BREAK.format(schema=schema, times=2))
    postgres.execute(WHEN[when].format(schema=schema))
    process = federation.processes["server"]
    federation.job("disturbed", rounds=ROUNDS)
    done = federation.console("submit_job disturbed --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    federation.tally.fault("session ended in the close of a round", 2)
    federation.tally.recovered()
    (count,) = postgres.execute(f"SELECT last_value FROM {schema}.broken")[0]
    assert count == 2 + ROUNDS, "it broke twice in the first close, and every round closed"
    events = federation.events(1)
    assert [e.round for e in events if isinstance(e, ev.RoundClosed)] == [1, 2, 3]
    accepted = [e.task_id for e in events if isinstance(e, ev.UpdateAccepted)]
    assert len(accepted) == len(set(accepted)) == 2 * ROUNDS
    assert process.poll() is None, "the server has connected again"
    done = federation.console(f"submit_job {federation.job('calm', rounds=ROUNDS)} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert federation.final_digest(2) == federation.final_digest(1)
