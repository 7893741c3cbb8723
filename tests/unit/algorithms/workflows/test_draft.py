from flplatform.algorithms.workflows.draft import Draft, Timers, gather_pending, gather_tasks
from flplatform.core.events import GatherClosed, GatherOpened, QuorumSet, RunEnded
from flplatform.core.workflow import Offer, Roster, Wake
from tests.support.workflows import Played, training, validating


def draft_of(run: Played, roster: Roster | None = None) -> Draft:
    return Draft(run.state, roster or run.roster)


def test_a_draft_reads_its_own_events():
    run = training("abc")
    draft = draft_of(run)
    draft.emit(QuorumSet(min_clients=3, by="operator"))
    assert draft.state.min_clients == 3
    assert run.state.min_clients == 2
    assert draft.events == [QuorumSet(min_clients=3, by="operator")]


def test_the_end_is_an_event():
    draft = draft_of(training())
    draft.end("aborted", "enough", "operator")
    assert draft.events == [RunEnded(status="aborted", reason="enough", by="operator")]
    assert draft.state.ended


def test_usable_is_deployed_live_and_not_disabled_in_name_order():
    run = Played("dcba").accept("d", "c", "a")
    roster = Roster(live=frozenset("abcdx"), disabled=frozenset("c"))
    assert draft_of(run, roster).usable == ("a", "d")


def test_only_the_timer_that_fired_is_over():
    wake = Wake("wait/1/2", 5.0)
    assert Timers("wait/1/2").has(wake)
    assert not Timers("wait/1/3").has(wake)
    assert not Timers().has(wake)


def test_a_gathering_without_participants_closes_at_once():
    draft = draft_of(training())
    draft.open_gather("submit", (), {})
    assert draft.close_gather("submit", Timers())
    assert draft.events == [
        GatherOpened(stage="submit", round=1, participants=(), models={}),
        GatherClosed(stage="submit", reason="all participants answered", gaps={}),
    ]


def test_a_closed_gathering_closes_only_once():
    draft = draft_of(validating())
    assert draft.close_gather("submit", Timers("gather/submit/0"))
    assert draft.close_gather("submit", Timers("gather/submit/0"))
    assert len(draft.events) == 1


def test_a_gathering_waits_while_somebody_can_answer():
    draft = draft_of(validating(), Roster(frozenset("b")))
    assert not draft.close_gather("submit", Timers("gather/validate/0"))
    assert draft.events == []


def test_settled_tasks_are_offered_no_more():
    run = validating("ab")
    gather = run.state.gathers["submit"]
    assert [str(task.id) for task in gather_tasks(run.state, gather)] == [
        "7/0/submit_model/a",
        "7/0/submit_model/b",
    ]
    run.submit_model("a")
    assert gather_pending(run.state, "submit") == [
        Offer(gather_tasks(run.state, gather)[1]),
        Wake("gather/submit/0", 600.0),
    ]


def test_nothing_is_pending_before_and_after_a_gathering():
    run = validating("ab")
    assert gather_pending(run.state, "validate") == []
    run.submit_model("a", "b")
    assert gather_pending(run.state, "submit") == []
