"""Why a run ended: the sum, who declined, what failed."""

from flplatform.core.events import SiteAnswered
from flplatform.server.diagnosis import why_run
from tests.support.workflows import Played, training
from tests.unit.server.diagnosis.test_why_run import text
from tests.unit.server.diagnosis.told import told


def test_finished() -> None:
    run = training("ab", workflow=["scatter_gather"]).round()
    why = why_run(told(run))
    assert (why.cause, why.headline) == ("finished", "run 7 finished: all steps done")
    assert "lineage 7" in why.can
    assert "download_model 7 last" in why.can


def test_too_many_declined() -> None:
    run = Played("abc", min_clients=2)
    run.decline("a", "policy byoc = none", "no foreign code")
    run.decline("b", "", "no such dataset")
    why = why_run(told(run))
    assert why.cause == "declined"
    assert len(run.of(SiteAnswered)) == 2
    assert "a declined (policy byoc = none): no foreign code" in text(why)
    assert "quorum: 3 targets, 0 accepted, 2 declined, 1 silent; min_clients 2" in text(why)


def test_a_task_failed() -> None:
    run = training("ab", min_clients=2)
    run.fail("b", "ValueError: no data")
    why = why_run(told(run))
    assert why.cause == "task_failed"
    assert why.ask == ("b",)
    assert "7/1/train/b failed: ValueError: no data" in text(why)
    assert "  b | Traceback" in text(why)
    assert "2 participants of round 1, 0 accepted, 1 failed, 1 unanswered" in text(why)
    assert why.can[0] == "logs 7 b"


def test_a_deadline_passed() -> None:
    run = training("ab", min_clients=2, on_deadline="abort").updates("a")
    run.fire("deadline")
    why = why_run(told(run))
    assert why.cause == "deadline"
    assert "by workflow" in why.headline
    assert "1 accepted, 0 failed, 1 unanswered" in text(why)


def test_aborted() -> None:
    run = training("ab")
    run.abort()
    why = why_run(told(run))
    assert why.cause == "aborted"
    assert "run 7 aborted by operator: wrong data" in why.headline


def test_quorum_lost_for_good() -> None:
    run = Played("ab", min_clients=2)
    run.go("b")
    run.accept()
    run.fire("quorum")
    why = why_run(told(run))
    assert why.cause == "quorum_lost"
    assert "2 targets, 2 accepted, 0 declined, 0 silent" in text(why)


def test_aggregation_failed() -> None:
    run = training("ab").updates("a", "b")
    run.break_down("aggregation: disk on fire")
    why = why_run(told(run))
    assert why.cause == "aggregation_failed"
    assert "disk on fire" in why.headline
