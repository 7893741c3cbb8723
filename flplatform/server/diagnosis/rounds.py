"""One round: who was in, who was not and why, how long each took, and why it closed."""

from collections.abc import Mapping

from flplatform.core import events as ev
from flplatform.core.diagnosis import Diagnosis, Line, Part
from flplatform.core.errors import NotFoundError
from flplatform.core.messages import TRAIN, TaskId
from flplatform.server.diagnosis.facts import Facts, answered_after, names, span
from flplatform.server.diagnosis.runs import why_run
from flplatform.server.wording import declined, describe


def why_round(facts: Facts, number: int) -> Diagnosis:
    """Explain a round, open or closed.

    Raises:
        NotFoundError: the run has not opened it.
    """
    run = facts.state.run
    opened_at = next(
        (
            index
            for index, event in enumerate(facts.events)
            if isinstance(event, ev.RoundOpened) and event.round == number
        ),
        None,
    )
    if opened_at is None:
        last = facts.state.round
        raise NotFoundError(
            f"run {run} has not opened round {number}",
            hint=f"it has rounds 1 to {last}" if last else "it has opened none yet",
        )
    parts = tuple(_parts(facts, opened_at, number))
    current = facts.state.open_round
    if current is not None and current.opened.round == number and not current.closed:
        now = why_run(facts)
        still = "was open when the run ended" if facts.state.ended else "is open"
        opened = f"since {span(facts.age(facts.times[opened_at]))}"
        return Diagnosis(
            headline=f"round {number} of run {run} {still}, {opened}: {now.headline}",
            cause="round_open",
            run=run,
            waits_for=now.waits_for,
            lines=now.lines,
            next=now.next,
            can=now.can,
            parts=parts,
            ask=now.ask,
        )
    return _closed(facts, opened_at, number, parts)


def _closed(facts: Facts, opened_at: int, number: int, parts: tuple[Part, ...]) -> Diagnosis:
    lines, headline = [Line(facts.times[opened_at], describe(facts.events[opened_at]))], ""
    for event, time in zip(facts.events[opened_at:], facts.times[opened_at:], strict=True):
        match event:
            case ev.RoundClosed(round=at) if at == number:
                took = facts.age(facts.times[opened_at]) - facts.age(time)
                headline = (
                    f"round {number} of run {facts.state.run} closed after {span(took)} "
                    f"({event.reason}) with {len(event.contributions)} of "
                    f"{sum(part.outcome != 'not in' for part in parts)} updates"
                )
                if event.stragglers:
                    headline += f", without {names(event.stragglers)}"
                lines.append(Line(time, describe(event)))
            case ev.DeadlineExtended(round=at) | ev.ModelPublished(round=at) if at == number:
                lines.append(Line(time, describe(event)))
            case ev.ModelScored(round=at) if at == number:
                lines.append(Line(time, describe(event)))
            case ev.TaskFailed() if _is_of(event, number):
                lines.append(Line(time, describe(event)))
            case ev.RoundOpened(round=at) if at > number:
                break
            case ev.QuorumSet():
                lines.append(Line(time, describe(event)))
    return Diagnosis(
        headline=headline,
        cause="round_closed",
        run=facts.state.run,
        lines=tuple(lines),
        can=(f"lineage {facts.state.run} {number}",),
        parts=parts,
    )


def _is_of(event: ev.TaskFailed, number: int) -> bool:
    task_id = TaskId.parse(event.task_id)
    return task_id.round == number and task_id.kind == TRAIN


def _parts(facts: Facts, opened_at: int, number: int) -> list[Part]:
    opened = facts.events[opened_at]
    assert isinstance(opened, ev.RoundOpened)
    took = answered_after(facts, opened_at)
    failed: Mapping[str, tuple[str, float]] = {
        event.site: (event.error, facts.age(facts.times[opened_at]) - facts.age(time))
        for event, time in zip(facts.events, facts.times, strict=True)
        if isinstance(event, ev.TaskFailed) and _is_of(event, number)
    }
    current = facts.state.open_round
    is_open = current is not None and current.opened.round == number and not current.closed
    parts = []
    for site in sorted({*facts.targets, *opened.participants}):
        if number in took.get(site, {}):
            parts.append(Part(site, "accepted", took[site][number]))
        elif site in failed:
            error, seconds = failed[site]
            parts.append(Part(site, "failed", seconds, error))
        elif site in opened.participants:
            outcome = "open" if is_open and not facts.state.ended else "straggler"
            parts.append(Part(site, outcome, None, "" if is_open else "no update before it closed"))
        else:
            parts.append(Part(site, "not in", None, _absence(facts, site, opened_at)))
    return parts


def _absence(facts: Facts, site: str, opened_at: int) -> str:
    """Say why a target was no participant, as far as the log tells."""
    answer: ev.SiteAnswered | None = None
    for event in facts.events[:opened_at]:
        if isinstance(event, ev.SiteAnswered) and event.site == site:
            answer = event
        elif isinstance(event, ev.SiteWithdrawn) and event.site == site:
            return f"withdrawn by {event.by}: {event.reason}"
    if answer is None:
        return "had not answered the start when the round opened"
    if not answer.accepted:
        return declined(answer)
    return "was not connected, or disabled, when the round opened"
