"""A round: who was in, who was not, how long each took, and why it closed."""

import pytest

from flplatform.core.errors import NotFoundError
from flplatform.server.diagnosis import why_round
from tests.support.workflows import Played, training
from tests.unit.server.diagnosis.told import told


def closed_round() -> Played:
    run = Played("abcde", rounds=2, min_clients=2, wait_after_min_s=1)
    run.decline("d", "accept_jobs", "not today")
    run.go("e")
    run.accept("a", "b", "c", "e")
    run.updates("a")
    run.fail("c", "out of memory")
    run.updates("b")
    if run.state.open_round and not run.state.open_round.closed:
        run.fire("wait")
    run.publish()
    return run


def test_a_closed_round() -> None:
    run = closed_round()
    why = why_round(told(run), 1)
    assert why.cause == "round_closed"
    parts = {part.site: (part.outcome, part.why) for part in why.parts}
    assert parts["a"] == ("accepted", "")
    assert parts["c"] == ("failed", "out of memory")
    assert parts["d"] == ("not in", "declined (accept_jobs): not today")
    assert parts["e"] == ("not in", "was not connected, or disabled, when the round opened")
    assert [part.took_s for part in why.parts][:3] == [1.0, 3.0, 2.0]
    assert "all participants answered" in why.headline
    assert "with 2 of 3 updates" in why.headline
    assert why.can == ("lineage 7 1",)


def test_a_straggler() -> None:
    run = training("ab", rounds=2, min_clients=1, wait_after_min_s=1).updates("a")
    run.fire("wait")
    run.publish()
    why = why_round(told(run), 1)
    assert "without b" in why.headline
    assert {part.site: part.outcome for part in why.parts} == {"a": "accepted", "b": "straggler"}


def test_an_open_round_is_explained_as_its_run() -> None:
    run = training("ab", min_clients=2).updates("a")
    why = why_round(told(run), 1)
    assert why.cause == "round_open"
    assert "is open" in why.headline
    assert why.waits_for[0].site == "b"
    assert {part.site: part.outcome for part in why.parts} == {"a": "accepted", "b": "open"}


def test_a_round_that_was_open_when_its_run_ended() -> None:
    run = training("ab", min_clients=2).updates("a")
    run.abort()
    why = why_round(told(run), 1)
    assert "was open when the run ended" in why.headline


def test_a_round_that_was_not_opened() -> None:
    with pytest.raises(NotFoundError, match="has not opened round 4") as caught:
        why_round(told(training("ab")), 4)
    assert caught.value.hint == "it has rounds 1 to 1"
