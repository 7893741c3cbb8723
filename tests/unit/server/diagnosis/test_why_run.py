"""Each thing that a run can wait for has a code and words of its own."""

import time
from dataclasses import replace
from datetime import timedelta

import pytest

from flplatform.core.diagnosis import CAUSES, SITE_CAUSES, Diagnosis, run_lost
from flplatform.core.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.server.diagnosis import why_run
from tests.support.control import site
from tests.support.workflows import Played, training, validating
from tests.unit.server.diagnosis.told import BEGIN, live, refused, told

LONG = BEGIN + timedelta(seconds=100)


def text(diagnosis: Diagnosis) -> str:
    return "\n".join(line.text for line in diagnosis.lines)


def coming(diagnosis: Diagnosis) -> str:
    return "\n".join(item.text for item in diagnosis.next)


def causes(diagnosis: Diagnosis) -> dict[str, str]:
    assert diagnosis.cause in CAUSES
    assert all(item.cause in SITE_CAUSES for item in diagnosis.waits_for)
    assert list(diagnosis.lines) == sorted(diagnosis.lines, key=lambda line: line.time)
    return {item.site: item.cause for item in diagnosis.waits_for}


# ---- where a run is -----------------------------------------------------------------------------


def test_answers_are_outstanding() -> None:
    run = Played("abc").accept("a")
    why = why_run(told(run, ago=12.0))
    assert why.cause == "deploying"
    assert causes(why) == {"b": "no_answer", "c": "no_answer"}
    assert why.headline == (
        "run 7 waits for b, c to answer the start, since 12.0 s; "
        "1 of 3 sites have answered, quorum 2"
    )
    assert "a accepted" in text(why)
    assert coming(why) == ("deploy_wait_s is over: who has not answered is not waited for any more")
    assert "abort all --run 7" in why.can


def test_a_refusal_shows_its_rule() -> None:
    run = Played("abc").accept("a")
    run.decline("b", "policy byoc = none", "no foreign code")
    assert "b declined (policy byoc = none): no foreign code" in text(why_run(told(run)))


def test_too_few_sites_to_open_a_round() -> None:
    away = {name: site(name, state="away", last_seen_s=30.0) for name in "bc"}
    run = Played("abc")
    run.go("b", "c")
    run.accept()
    why = why_run(told(run, ago=3.0, views=away))
    assert why.cause == "quorum_lost"
    assert causes(why) == {"b": "away", "c": "away"}
    assert "1 of 2 needed are there; missing: b, c" in why.headline
    assert "run 7 fails: only 1 of 2 needed sites" in coming(why)
    assert "set_min_clients 1 --run 7" in why.can


def test_training_below_quorum() -> None:
    run = training("abc", min_clients=3, round_deadline_s=120).updates("a", "b")
    opened = run.events.index(run.state.open_round.opened)
    why = why_run(told(run, ago=14.1, times={opened + 1: 50.0, opened + 2: 51.0}))
    assert why.headline == (
        "run 7 waits in round 1 for c, since 14.1 s; quorum 3 not reached (2 accepted)"
    )
    assert why.cause == "training"
    assert coming(why) == "deadline: extended once by 120 s, then run 7 aborts"
    assert "set_min_clients 2 --run 7" in why.can
    assert "logs -f 7 c" in why.can
    assert why.can[-1] == "abort all --run 7"
    assert why.ask == ("c",)


def test_an_extended_deadline_ends_the_run() -> None:
    run = training("ab", min_clients=2).updates("a")
    run.fire("deadline")
    why = why_run(told(run))
    assert "the deadline of round 1 passed and was extended" in text(why)
    assert "deadline: run 7 aborts: the deadline of round 1 passed with 1 of 2" in coming(why)


def test_quorum_is_reached_and_the_wait_is_on() -> None:
    run = training("abc", min_clients=2, wait_after_min_s=10).updates("a", "b")
    timers = {"wait/1/2": 4.2, "deadline/1": 590.0}
    why = why_run(told(run, timers=timers))
    assert why.cause == "wait_after_min"
    assert "it closes in 4.2 s at the latest" in why.headline
    assert [item.in_s for item in why.next] == [4.2, 590.0]
    assert why.next[0].text == "wait_after_min_s is over: round 1 closes with 2 updates without c"
    assert not [command for command in why.can if command.startswith("set_min")]


def test_aggregating() -> None:
    why = why_run(told(training("ab").updates("a", "b"), ago=2.0))
    assert why.cause == "aggregating"
    assert causes(why) == {"server": "working"}
    assert "round 1 is closed and the server aggregates 2 updates" in why.headline


@pytest.mark.parametrize("what", ["append", "aggregate/1"])
def test_the_servers_disk_is_full(what: str) -> None:
    run = training("ab").updates("a", "b")
    trouble = {what: (told(run).times[-1], "the disk is full (rule: disk)", "disk_full")}
    why = why_run(told(run, ago=7.0, troubles=trouble))
    assert why.cause == "disk_full"
    assert causes(why) == {"server": "disk_full"}
    assert "waits for space at the server, since 7.0 s" in why.headline


def test_the_server_has_lost_an_update() -> None:
    run = training("ab").updates("a", "b")
    trouble = {"aggregate/1": (told(run).times[-1], "there is no blob 1; put it back", "blob_lost")}
    why = why_run(told(run, ago=7.0, troubles=trouble))
    assert (why.cause, causes(why)) == ("blob_lost", {"server": "blob_lost"})
    assert "waits for a model that is lost or damaged at the server, since 7.0 s" in why.headline
    assert "put it back" in why.headline


def test_validating_gathers() -> None:
    run = validating("ab")
    run.submit_model("a")
    views = {"b": live("b", "submit_model", 3.0, 0)}
    why = why_run(told(run, views=views))
    assert why.cause == "validating"
    assert causes(why) == {"b": "working"}
    assert "waits for b to hand in their best local models" in why.headline
    assert "1 of 2 results are in" in why.headline
    assert "submit closes with 1 gap" in coming(why)
    run.submit_model("b")
    run.validate("a", "a")
    why = why_run(told(run))
    assert "to validate 3 models each" in why.headline
    assert "1 of 6 results are in" in why.headline


# ---- who does no work for it --------------------------------------------------------------------


BACK = ("abort client c --run 7", "start client c --run 7")
"""How `c` comes to have the run again."""


def test_a_site_that_has_lost_the_run() -> None:
    run = training("abc", rounds=2, min_clients=2).updates("a")
    run.fail("c", f"{run_lost(7)}: do this")
    why = why_run(told(run))
    assert why.can[:2] == BACK
    assert "abort all --run 7" not in why.can, "the others go on"
    assert text(why).count("this site does not have run 7") == 1
    run.update("b")
    run.publish()
    assert "this site does not have run 7" in text(why_run(told(run))), "though a round is over"
    run.withdraw("c")
    assert why_run(told(run)).can[0] == BACK[1]
    run.add("c")
    why = why_run(told(run))
    assert not any("client c" in command for command in why.can), "it is asked anew"
    assert why.can[-1] == "abort all --run 7"


def test_a_site_that_works_again_has_the_run() -> None:
    run = training("abc", rounds=2, min_clients=2)
    run.fail("c", run_lost(7))
    run.updates("a", "b").publish()
    run.update("c")
    assert why_run(told(run)).can[-1] == "abort all --run 7"


def test_what_a_run_cannot_do_without_is_not_taken_from_it() -> None:
    """Who is left is too few: withdrawing one more ends the run."""
    run = training("abc", rounds=2, min_clients=2)
    run.fail("c", run_lost(7))
    run.updates("a", "b").publish()
    run.withdraw("b")
    assert run.status == "training"
    for command in why_run(told(run)).can:
        assert not command.startswith("abort client c")


def test_a_site_that_declined_is_asked_again() -> None:
    run = Played("abc").accept("a")
    run.decline("c", "", "no such dataset")
    why = why_run(told(run))
    assert "c declined: no such dataset" in text(why)
    assert BACK[1] in why.can
    assert BACK[0] not in why.can
    why = why_run(told(run, views={"c": site("c", state="disabled")}))
    assert BACK[1] not in why.can, "it would be refused"


def test_after_the_last_round_nobody_is_asked_to_join() -> None:
    run = validating("abc", min_clients=2)
    run.fail("c", run_lost(7), kind="submit_model")
    why = why_run(told(run))
    assert not any("client c" in command for command in why.can)
    assert why.can[-1] == "abort all --run 7"


# ---- how a site is ------------------------------------------------------------------------------


def waits_for_b(**changes: object) -> Diagnosis:
    return why_run(told(training("ab", min_clients=2).updates("a"), **changes))


def test_a_site_that_never_registered() -> None:
    why = why_run(told(Played("ab").accept("a"), views={"b": None}))
    assert causes(why) == {"b": "never_registered"}
    assert why.ask == ()


@pytest.mark.parametrize(
    ("state", "words"),
    [("away", "is not connected"), ("stopped", "has stopped"), ("removed", "was removed")],
)
def test_a_site_that_is_away(state: str, words: str) -> None:
    why = waits_for_b(views={"b": site("b", state=state, last_seen_s=41.0)})
    assert causes(why) == {"b": "away"}
    assert words in why.waits_for[0].text
    assert "41.0 s ago" in why.waits_for[0].text
    assert "b last seen" in text(why)


def test_a_site_that_is_expected_back() -> None:
    why = waits_for_b(views={"b": site("b", state="expected", last_seen_s=None)})
    assert causes(why) == {"b": "expected"}


def test_a_disabled_site() -> None:
    why = waits_for_b(views={"b": site("b", state="disabled")})
    assert causes(why) == {"b": "disabled"}
    assert why.can[0] == "enable_client b"


def test_a_silent_site_will_count_as_dead() -> None:
    run = training("abc", min_clients=2, wait_after_min_s=600).updates("a", "b")
    why = why_run(told(run, views={"c": site("c", last_seen_s=48.0)}))
    assert causes(why) == {"c": "silent"}
    assert "c missed its heartbeat; counted dead at" in text(why)
    assert why.next[0].in_s == pytest.approx(12.0)
    assert why.next[0].text == "c counts as dead: round 1 closes with 2 updates without c"
    assert why.can[0] == "remove_client c"


def test_a_slow_site_against_its_own_rounds() -> None:
    run = training("ab", rounds=3, min_clients=2).round().updates("a")
    opened = [i for i, event in enumerate(run.events) if type(event).__name__ == "RoundOpened"]
    views = {"b": live("b", "train", 31.0, 2)}
    why = why_run(told(run, ago=30.0, views=views))
    assert len(opened) == 2
    assert causes(why) == {"b": "slow"}
    assert "train since 31.0 s" in why.waits_for[0].text
    assert "its earlier round took 2.0 s" in why.waits_for[0].text
    why = why_run(told(run, ago=1.0, views=views))
    assert causes(why) == {"b": "working"}


def test_a_first_round_is_held_against_the_other_sites() -> None:
    why = waits_for_b(ago=60.0)
    assert causes(why) == {"b": "slow"}
    assert "the other sites in this round took 1.0 s" in why.waits_for[0].text


def test_a_crashing_run_process() -> None:
    why = waits_for_b(views={"b": live("b", "train, crashed 2 of 3")})
    assert causes(why) == {"b": "crashing"}
    assert "has crashed 2 of 3 times in train, then the task fails" in why.waits_for[0].text


def test_a_site_without_space() -> None:
    views = {"b": live("b", "downloading, retries: resource_exhausted", 20.0)}
    why = waits_for_b(views=views)
    assert causes(why) == {"b": "disk_full"}
    assert "has no space or meets a limit while downloading" in why.waits_for[0].text
    why = waits_for_b(views={"b": live("b", "uploading, retries: unavailable")})
    assert causes(why) == {"b": "retrying"}


@pytest.mark.parametrize(
    ("phase", "cause", "words"),
    [
        ("train, crashed 2 of 3", "crashing", "has crashed 2 of 3 times in train in round 1, "),
        ("uploading, retries: unavailable", "retrying", "while uploading in round 1"),
    ],
)
def test_what_held_a_site_up_in_an_earlier_round(phase: str, cause: str, words: str) -> None:
    run = training("ab", rounds=3, min_clients=2).round().updates("a")
    views = {"b": live("b", phase, 40.0, 1)}
    why = why_run(told(run, ago=3.0, views=views))
    assert causes(why) == {"b": "working"}, "it has not reported anything since the round opened"
    assert phase not in text(why) + why.waits_for[0].text
    views = {"b": live("b", phase, 400.0, 1)}
    why = why_run(told(run, ago=300.0, views=views))
    assert causes(why) == {"b": cause}, "it has reported many times since, and is held up there"
    assert words in why.waits_for[0].text
    assert f"b began: {phase}, round 1" in text(why)
    views = {"b": live("b", "downloading, retries: unavailable", 1.0, 1)}
    why = why_run(told(run, ago=3.0, views=views))
    assert causes(why) == {"b": "retrying"}, "the model of this round"
    assert "round 1" not in why.waits_for[0].text


def test_an_upload_that_the_server_has_no_space_for() -> None:
    full = ResourceExhaustedError("the disk is full", rule="disk")
    memory = refused("b", "7/1/train/b", full, LONG, times=3)
    why = waits_for_b(ago=100.0, refusals=memory)
    assert causes(why) == {"b": "disk_full"}
    assert "the server refused 7/1/train/b: the disk is full" in why.waits_for[0].text
    assert "b: 7/1/train/b was refused (3 times): the disk is full (rule: disk)" in text(why)


def test_a_site_that_waits_for_space_at_the_server() -> None:
    full = ResourceExhaustedError("9 bytes are to come, 0 are free", rule="reserve_bytes")
    views = {"b": live("b", "uploading, retries: resource_exhausted", 20.0)}
    why = waits_for_b(ago=100.0, views=views, refusals=refused("b", "7/1/train/b", full, LONG))
    assert causes(why) == {"b": "disk_full"}
    assert "the server has no room for what b sends: 9 bytes" in why.waits_for[0].text


def test_a_model_of_the_wrong_shape() -> None:
    wrong = InvalidArgumentError("is 80 bytes; a model of run 7 has 100", field="blob.size")
    why = waits_for_b(ago=100.0, refusals=refused("b", "7/1/train/b", wrong, LONG))
    assert causes(why) == {"b": "refused"}
    assert "a model of run 7 has 100" in why.waits_for[0].text


def test_a_refusal_of_an_earlier_round_is_over() -> None:
    wrong = InvalidArgumentError("is 80 bytes; a model of run 7 has 100", field="blob.size")
    why = waits_for_b(refusals=refused("b", "7/1/train/b", wrong, BEGIN))
    assert causes(why) == {"b": "working"}


@pytest.mark.parametrize("what", ["revoked", "expired at 2024-05-01T11:00:00+00:00"])
def test_a_certificate_that_is_refused(what: str) -> None:
    error = UnauthenticatedError(f"the certificate of b is {what}")
    views = {"b": site("b", state="away", last_seen_s=90.0)}
    memory = refused("b", "certificate", error, LONG, times=12)
    why = waits_for_b(ago=100.0, views=views, refusals=memory)
    assert causes(why) == {"b": "certificate"}
    assert f"the certificate of b is {what} (12 times)" in why.waits_for[0].text


def test_an_expired_certificate_that_tls_never_lets_in() -> None:
    views = {"b": site("b", state="away", last_seen_s=90.0)}
    why = waits_for_b(views=views, not_after={"b": BEGIN - timedelta(hours=3)})
    assert causes(why) == {"b": "certificate"}
    assert "expired 3 h 0 min ago: TLS refuses it" in why.waits_for[0].text


def test_a_task_that_was_not_taken() -> None:
    for view in (site("b"), live("b", "idle"), live("b", "train", number=0)):
        why = waits_for_b(ago=6.1, views={"b": view})
        assert causes(why) == {"b": "not_taken"}
        why = waits_for_b(ago=1.0, views={"b": view})
        assert causes(why) == {"b": "working"}, "what it reported is older than its task"
        assert why.waits_for[0].text.endswith(", and reports every 5.0 s")


def test_the_most_troubled_come_first_and_one_screen_holds_it() -> None:
    names = [f"s{number:03}" for number in range(60)]
    run = training(names, min_clients=45).updates(*names[:30])
    views = {names[-1]: live(names[-1], "train, crashed 1 of 3")}
    why = why_run(told(run, views=views))
    assert why.waits_for[0].site == names[-1]
    assert len(why.lines) <= 20
    assert "and 27 more" in why.headline
    assert len(why.ask) == 5


def test_a_long_log_is_explained_at_once() -> None:
    """A thousand rounds of fifty sites, all of whom are waited for."""
    names = [f"s{number:03}" for number in range(50)]
    run = training(names, rounds=2, min_clients=50)
    facts = told(run)
    many = 1000
    events = [*run.events, *(run.events[-1], *run.events[1:51]) * many]
    times = [facts.times[-1]] * len(events)
    long = replace(facts, events=events, times=times)
    began = time.process_time()
    assert len(why_run(long).waits_for) == 50
    assert time.process_time() - began < 1.5, "the event loop must not wait for an explanation"
