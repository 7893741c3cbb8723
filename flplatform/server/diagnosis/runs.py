"""Why a run waits: one function for each thing that it can wait for."""

from collections.abc import Iterable

from flplatform.core import events as ev
from flplatform.core.diagnosis import SITE_CAUSES, Diagnosis, Line, Waiting
from flplatform.server.diagnosis.ended import why_ended
from flplatform.server.diagnosis.facts import MAX_SITES, Facts, log_lines, names, span
from flplatform.server.diagnosis.outlook import coming, options
from flplatform.server.diagnosis.parted import lost
from flplatform.server.diagnosis.sites import all_waiting, site_lines
from flplatform.server.wording import count, describe

ASKABLE = frozenset(SITE_CAUSES) - {
    "disabled", "never_registered", "certificate", "away", "expected",
}  # fmt: skip
"""Causes of sites that may answer a question themselves."""


def why_run(facts: Facts) -> Diagnosis:
    """Say what a run waits for, or how it ended."""
    state = facts.state
    if state.ended:
        return why_ended(facts)
    if facts.troubles:
        return _stopped(facts)
    if state.step < 0:
        return _deploying(facts)
    if state.open_round is not None:
        return _aggregating(facts) if state.open_round.closed else _training(facts)
    if any(not gather.closed for gather in state.gathers.values()):
        return _gathering(facts)
    return _quorum_lost(facts)


def _made(
    facts: Facts,
    headline: str,
    cause: str,
    waits: tuple[Waiting, ...],
    more: Iterable[Line] = (),
) -> Diagnosis:
    start = facts.index_of_phase
    lines = [*_declines(facts, start), *log_lines(facts, start), *site_lines(facts, waits), *more]
    lines += list(lost(facts).values())[:MAX_SITES]
    ask = [item.site for item in waits if item.cause in ASKABLE and item.site in facts.sites]
    return Diagnosis(
        headline=f"run {facts.state.run} {headline}",
        cause=cause,
        run=facts.state.run,
        waits_for=waits,
        lines=tuple(sorted(dict.fromkeys(lines), key=lambda line: line.time)),
        next=coming(facts, waits),
        can=options(facts, waits),
        ask=tuple(ask[:MAX_SITES]),
    )


def _declines(facts: Facts, before: int) -> list[Line]:
    """Return who declined the run before what the log is told from: they are not waited for."""
    return [
        Line(time, describe(event))
        for event, time in zip(facts.events[:before], facts.times[:before], strict=True)
        if isinstance(event, ev.SiteAnswered) and not event.accepted
    ][:MAX_SITES]


def _since(facts: Facts) -> str:
    return f"since {span(facts.age(facts.times[-1]))}"


def _stopped(facts: Facts) -> Diagnosis:
    (what, (since, error, cause)), *_ = facts.troubles.items()
    lost = cause == "blob_lost"
    doing = "its log cannot be written" if what == "append" else f"{what} cannot be stored"
    text = f"{what} lacks what it is made of: {error}" if lost else f"{doing}: {error}"
    wanted = "a model that is lost or damaged" if lost else "space"
    server = Waiting("server", cause, text, facts.age(since))
    return _made(
        facts,
        f"waits for {wanted} at the server, since {span(facts.age(since))}: {text}",
        cause,
        (server,),
        [Line(since, f"server: {text}")],
    )


def _deploying(facts: Facts) -> Diagnosis:
    state = facts.state
    silent = [site for site in facts.targets if site not in state.answers]
    if not silent or state.deploy_wait_over:
        return _quorum_lost(facts)
    waits = all_waiting(facts, silent, "answer")
    said = f"{len(facts.targets) - len(silent)} of {len(facts.targets)} sites have answered"
    headline = f"waits for {names(silent)} to answer the start, {_since(facts)}; {said}"
    return _made(facts, f"{headline}, quorum {state.min_clients}", "deploying", waits)


def _quorum_lost(facts: Facts) -> Diagnosis:
    """Nothing is open: too few sites that have the run are there."""
    state = facts.state
    usable = state.deployed & facts.roster.usable
    missing = [site for site in facts.targets if site not in usable and _may_come(facts, site)]
    waits = all_waiting(facts, missing, "answer")
    headline = (
        f"waits for sites to open round {state.round + 1}, {_since(facts)}: "
        f"{len(usable)} of {state.min_clients} needed are there; missing: {names(missing)}"
    )
    return _made(facts, headline, "quorum_lost", waits)


def _may_come(facts: Facts, site: str) -> bool:
    answer = facts.state.answers.get(site)
    return (answer is None or answer.accepted) and site not in facts.state.withdrawn


def _training(facts: Facts) -> Diagnosis:
    state, current = facts.state, facts.state.open_round
    assert current is not None
    waits = all_waiting(facts, current.unsettled, "train")
    accepted, number = len(current.accepted), current.opened.round
    where = f"waits in round {number} for {names(current.unsettled)}, {_since(facts)}"
    if accepted < state.min_clients:
        arithmetic = f"quorum {state.min_clients} not reached ({accepted} accepted)"
        return _made(facts, f"{where}; {arithmetic}", "training", waits)
    left = min(
        (left for timer, left in facts.timers.items() if timer.startswith("wait/")), default=0.0
    )
    quorum = f"quorum {state.min_clients} reached ({accepted} accepted)"
    headline = f"{where}; {quorum}, it closes in {span(left)} at the latest (wait_after_min_s)"
    return _made(facts, headline, "wait_after_min", waits)


def _aggregating(facts: Facts) -> Diagnosis:
    current = facts.state.open_round
    assert current is not None
    assert current.closed is not None
    since = facts.age(facts.times[-1])
    updates = count(len(current.closed.contributions), "update")
    text = f"aggregates {updates} by {current.closed.aggregator}"
    server = Waiting("server", "working", f"server {text}", since)
    headline = f"waits for the server, since {span(since)}: round {current.opened.round} is closed"
    return _made(facts, f"{headline} and the server {text}", "aggregating", (server,))


def _source(facts: Facts) -> str:
    source = facts.state.opened.source_run
    return f"of run {source} " if source else ""


def _gathering(facts: Facts) -> Diagnosis:
    gather = next(item for item in facts.state.gathers.values() if not item.closed)
    opened = gather.opened
    each = max(1, len(opened.models))
    done: dict[str, int] = dict.fromkeys(opened.participants, 0)
    for task_id in (*gather.results, *gather.failed):
        done[task_id.site] = done.get(task_id.site, 0) + 1
    missing = [site for site, answered in done.items() if answered < each]
    waits = all_waiting(facts, missing, "result")
    what = {
        "score": f"score the model of round {opened.round}",
        "submit": "hand in their best local models",
        "validate": f"validate {each} models {_source(facts)}each",
    }[opened.stage]
    settled = f"{sum(done.values())} of {each * len(done)} results are in"
    headline = f"waits for {names(missing)} to {what}, {_since(facts)}; {settled}"
    return _made(facts, headline, "validating", waits)
