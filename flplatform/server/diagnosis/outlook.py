"""What will happen by itself, and what an operator could do: both asked of the workflow itself."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from flplatform.algorithms.workflows import decide
from flplatform.core import events as ev
from flplatform.core.diagnosis import Coming, Waiting, rejoin
from flplatform.core.errors import FLError
from flplatform.core.workflow import (
    Abort,
    AbortTasks,
    Input,
    Roster,
    RosterChanged,
    SetQuorum,
    TimerFired,
    Withdraw,
)
from flplatform.server.diagnosis.facts import Facts, names
from flplatform.server.diagnosis.parted import lost, parting
from flplatform.server.wording import count

MAX_TRIED = 3
"""Sites for which it is worked out what their death, or giving them up, would bring."""

TIMERS = {
    "deploy": "deploy_wait_s is over",
    "quorum": "quorum_wait_s is over",
    "wait": "wait_after_min_s is over",
    "deadline": "deadline",
    "gather": "validate_deadline_s is over",
}


def outcome(facts: Facts, given: Input, roster: Roster | None = None) -> tuple[ev.Event, ...]:
    """Return what an input would bring about now; nothing if it were refused."""
    try:
        return decide(facts.state, given, roster or facts.roster)
    except FLError:
        return ()


def coming(facts: Facts, waits: Iterable[Waiting]) -> tuple[Coming, ...]:
    """Return what comes by itself: timers, and the deaths of silent sites."""
    found = []
    for timer, left in facts.timers.items():
        name = TIMERS.get(timer.partition("/")[0], timer)
        text = f"{name}: {_foretell(facts, outcome(facts, TimerFired(timer)))}"
        found.append(Coming(facts.before(-left), left, text))
    for item in [item for item in waits if item.cause == "silent"][:MAX_TRIED]:
        left = facts.dead_after_s - (item.since_s or 0.0)
        text = f"{item.site} counts as dead: {_foretell(facts, _without(facts, item.site))}"
        found.append(Coming(facts.before(-left), left, text))
    return tuple(sorted(found, key=lambda item: item.in_s))


def options(facts: Facts, waits: Iterable[Waiting]) -> tuple[str, ...]:
    """Return the commands that would be accepted now, and would bring the run on or end it."""
    return tuple(dict.fromkeys(_options(facts, list(waits))))


def remedies(facts: Facts, site: str, *, has_lost: bool = False) -> tuple[str, ...]:
    """Return the commands, in order, after which a site works on the run again; none if none help.

    Args:
        facts: the run.
        site: one that has declined the run, was withdrawn, or has lost it.
        has_lost: whether it takes part and has lost the run.
    """
    state, view = facts.state, facts.sites.get(site)
    if state.ended or view is None or view.state in ("disabled", "revoked"):
        return ()
    if state.opened.source_run or "scatter_gather" not in state.job.workflow[max(0, state.step) :]:
        return ()  # no round is to come that it could take part in
    abort, start = rejoin(site, state.run)
    if not has_lost:
        return (start,)
    given_up = outcome(facts, Withdraw((site,), ""))
    return () if any(_is_bad_end(event) for event in given_up) else (abort, start)


def _options(facts: Facts, waits: list[Waiting]) -> Iterator[str]:
    run = facts.state.run
    anew = [each for site in lost(facts) for each in remedies(facts, site, has_lost=True)]
    yield from anew[: 2 * MAX_TRIED]
    for site in [site for site in facts.targets if parting(facts, site)][:MAX_TRIED]:
        yield from remedies(facts, site)
    for item in waits[:MAX_TRIED]:
        if item.cause == "disabled":
            yield f"enable_client {item.site}"
        elif item.cause == "silent" and _without(facts, item.site):
            yield f"remove_client {item.site}"
    if (quorum := _reachable_quorum(facts)) and outcome(facts, SetQuorum(quorum, "")):
        yield f"set_min_clients {quorum} --run {run}"
    for item in waits[:MAX_TRIED]:
        given_up = outcome(facts, AbortTasks((item.site,), ""))
        if given_up and not any(_is_bad_end(event) for event in given_up):
            yield f"abort_task {item.site} --run {run}"
    if any(item.cause in ("crashing", "slow", "working", "disk_full") for item in waits):
        site = next(
            w.site for w in waits if w.cause in ("crashing", "slow", "working", "disk_full")
        )
        yield f"logs -f {run} {site if site in facts.sites else '--server'}"
    if not anew and outcome(facts, Abort("")):
        yield f"abort all --run {run}"


def _is_bad_end(event: ev.Event) -> bool:
    return isinstance(event, ev.RunEnded) and event.status != "finished"


def _reachable_quorum(facts: Facts) -> int:
    """Return the quorum below the present one that is there already; 0 if that brings nothing."""
    state, current = facts.state, facts.state.open_round
    if current is not None:
        there = 0 if current.closed else len(current.accepted)
    elif any(not gather.closed for gather in state.gathers.values()):
        there = 0
    else:
        there = len(state.deployed & facts.roster.usable)
    return there if there < state.min_clients else 0


def _without(facts: Facts, site: str) -> tuple[ev.Event, ...]:
    roster = replace(facts.roster, live=facts.roster.live - {site})
    return outcome(facts, RosterChanged(), roster)


def _foretell(facts: Facts, events: Iterable[ev.Event]) -> str:
    said = [text for event in events if (text := _future(facts, event))]
    return ", ".join(said) or "the run waits on"


def _future(facts: Facts, event: ev.Event) -> str:
    job = facts.state.job
    match event:
        case ev.DeadlineExtended():
            return f"extended once by {job.round_deadline_s:g} s, then run {facts.state.run} aborts"
        case ev.RoundClosed():
            late = f" without {names(event.stragglers)}" if event.stragglers else ""
            updates = count(len(event.contributions), "update")
            return f"round {event.round} closes with {updates}{late}"
        case ev.RoundOpened():
            return f"round {event.round} opens with {names(event.participants)}"
        case ev.DeployWaitOver():
            return "who has not answered is not waited for any more"
        case ev.GatherClosed():
            return f"{event.stage} closes with {count(len(event.gaps), 'gap')}"
        case ev.RunEnded():
            how = {"failed": "fails", "aborted": "aborts"}.get(event.status, event.status)
            return f"run {facts.state.run} {how}: {event.reason}"
        case _:
            return ""
