"""Why a run ended the way it did: who declined, what failed where, and the sum of the quorum."""

from collections.abc import Iterator

from flplatform.core import events as ev
from flplatform.core.diagnosis import Diagnosis, Line
from flplatform.core.messages import TaskId
from flplatform.server.diagnosis.facts import MAX_SITES, Facts
from flplatform.server.wording import describe

TRACEBACK_LINES = 5
MAX_CHARS = 300
KEPT = (ev.DeadlineExtended, ev.QuorumSet, ev.SiteWithdrawn, ev.DeployWaitOver, ev.RoundClosed)
"""Events that explain an end, besides refusals and failures."""

MAX_KEPT = 4


def why_ended(facts: Facts) -> Diagnosis:
    """Say how a run ended, with everything in its log that explains it."""
    state, run = facts.state, facts.state.run
    assert state.ended is not None
    cause = cause_of_end(facts)
    by = (
        f" by {state.ended.by}"
        if state.ended.by and state.ended.by not in describe(state.ended)
        else ""
    )
    ended = f"{state.ended.status}{by}: {state.ended.reason}" if by else describe(state.ended)
    headline = f"run {run} {ended}"
    lines = [] if cause == "finished" else list(_lines(facts, cause))
    lines.append(Line(facts.times[-1], describe(state.ended)))
    failing = tuple(dict.fromkeys(event.site for event, _ in _failures(facts)))[:MAX_SITES]
    return Diagnosis(
        headline=headline,
        cause=cause,
        run=run,
        lines=tuple(sorted(lines, key=lambda line: line.time)),
        can=tuple(_options(facts, cause, failing)),
        ask=failing if cause == "task_failed" else (),
    )


def cause_of_end(facts: Facts) -> str:
    """Return the code of how a run ended."""
    state = facts.state
    assert state.ended is not None
    if state.ended.status == "finished":
        return "finished"
    if state.ended.status == "aborted":
        return "deadline" if state.ended.by == "workflow" else "aborted"
    current = state.open_round
    if current is not None and current.closed is not None:
        return "aggregation_failed"
    if current is not None and current.possible < state.min_clients:
        return "task_failed"
    declined = sum(not answer.accepted for answer in state.answers.values())
    if state.step < 0 and len(facts.targets) - declined < state.min_clients:
        return "declined"
    return "quorum_lost"


def _lines(facts: Facts, cause: str) -> Iterator[Line]:
    state = facts.state
    kept = [
        pair for pair in zip(facts.events, facts.times, strict=True) if isinstance(pair[0], KEPT)
    ]
    for event, time in kept[-MAX_KEPT:]:
        yield Line(time, describe(event))
    refused = [
        (event, time)
        for event, time in zip(facts.events, facts.times, strict=True)
        if isinstance(event, ev.SiteAnswered) and not event.accepted
    ]
    for event, time in refused[:MAX_SITES]:
        yield Line(time, describe(event)[:MAX_CHARS])
    for failed, time in _failures(facts)[-MAX_SITES:]:
        yield Line(time, describe(failed)[:MAX_CHARS])
        for text in failed.traceback.splitlines()[-TRACEBACK_LINES:]:
            yield Line(time, f"  {failed.site} | {text[:MAX_CHARS]}")
    if cause in ("declined", "quorum_lost", "task_failed", "deadline"):
        yield Line(
            facts.times[-1], f"quorum: {_arithmetic(facts)}; min_clients {state.min_clients}"
        )


def _arithmetic(facts: Facts) -> str:
    state, current = facts.state, facts.state.open_round
    if current is None:
        answers = state.answers.values()
        accepted = sum(answer.accepted for answer in answers)
        silent = len(facts.targets) - len(answers)
        return (
            f"{len(facts.targets)} targets, {accepted} accepted, "
            f"{len(answers) - accepted} declined, {silent} silent"
        )
    return (
        f"{len(current.opened.participants)} participants of round {current.opened.round}, "
        f"{len(current.accepted)} accepted, {len(current.failed)} failed, "
        f"{len(current.unsettled)} unanswered, so at most {current.possible} updates"
    )


def _failures(facts: Facts) -> list[tuple[ev.TaskFailed, str]]:
    """Return the failures of the last round that had any, with their times."""
    found = [
        (event, time)
        for event, time in zip(facts.events, facts.times, strict=True)
        if isinstance(event, ev.TaskFailed)
    ]
    last = max((TaskId.parse(event.task_id).round for event, _ in found), default=0)
    return [(event, time) for event, time in found if TaskId.parse(event.task_id).round == last]


def _options(facts: Facts, cause: str, failing: tuple[str, ...]) -> Iterator[str]:
    run = facts.state.run
    if cause == "task_failed" and failing:
        yield f"logs {run} {failing[0]}"
    if facts.state.round:
        yield f"show_metrics {run}"
        yield f"lineage {run}"
    if len(facts.state.models) > 1:
        yield f"download_model {run} last"
