"""Why one site is waited for: each case with a code of its own, the gravest first."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flplatform.core.control import SiteView
from flplatform.core.diagnosis import SITE_CAUSES, Line, Waiting
from flplatform.server.diagnosis.facts import (
    MAX_SITES,
    Facts,
    Surroundings,
    answered_after,
    recent,
    span,
    usual,
)
from flplatform.server.refusals import Refusal

SLOW = 2.0
"""A task counts as slow once it takes this many times as long as usual."""

SILENT = 2.0
"""A site counts as silent after this many heartbeats."""

REPORT_S = 1.0
"""What a report that is due may take."""

CERTIFICATE = "certificate"
"""What a refusal is about that a certificate met."""

IDLE_PHASES = ("idle", "deployed")
_CRASHED = re.compile(r"crashed (\d+) of (\d+)")
_RETRIES = re.compile(r"retries: (\w+)")


@dataclass(frozen=True, slots=True)
class Owed:
    """What sites owe a run; one value for all of them.

    Attributes:
        what: `answer`, `train` or `result`.
        since: when it was asked for, UTC.
        took: site → round → how long its last updates took, seconds.
    """

    what: str
    since: str
    took: Mapping[str, Mapping[int, float]]


def owed(facts: Facts, what: str) -> Owed:
    """Return what sites owe now, with what it is held against."""
    took = answered_after(facts, recent(facts)) if what == "train" else {}
    return Owed(what, facts.times[facts.index_of_phase], took)


def all_waiting(facts: Facts, sites: Iterable[str], what: str) -> tuple[Waiting, ...]:
    """Explain each of the sites that are waited for, the most troubled first.

    Args:
        facts: the run.
        sites: who is waited for.
        what: what they owe, see `Owed`.
    """
    task = owed(facts, what)
    found = [waiting(facts, site, task) for site in sites]
    return tuple(sorted(found, key=lambda item: (SITE_CAUSES.index(item.cause), item.site)))


def waiting(facts: Facts, site: str, task: Owed) -> Waiting:
    """Explain why one site is waited for."""
    view = facts.sites.get(site)
    refusal = facts.refused(site, facts.state.run) or facts.refused(site, None)
    if view is not None and view.state == "disabled":
        return Waiting(site, "disabled", f"{site} is disabled: it is given no tasks")
    if view is None or view.state != "live":
        return absent(facts, site, view, facts.refused(site, None))
    return _present(facts, view, refusal, task)


def absent(
    facts: Surroundings, site: str, view: SiteView | None, refusal: Refusal | None
) -> Waiting:
    """Explain why a site is not there."""
    seen = view.last_seen_s if view else None
    if refusal and (seen is None or facts.age(refusal.time) < seen):
        cause = CERTIFICATE if refusal.what == CERTIFICATE else "refused"
        text = f"{site} is not connected: the server refuses it: {refusal.error}{_times(refusal)}"
        return Waiting(site, cause, text, facts.age(refusal.first))
    if view is not None and view.state == "revoked":
        return Waiting(site, CERTIFICATE, f"{site} is revoked: the server refuses it", seen)
    if view is None:
        return Waiting(site, "never_registered", f"{site} has never registered with this server")
    if view.state == "expected":
        text = f"{site} has not come back yet since the server's restart"
        return Waiting(site, "expected", text, seen)
    ended = facts.not_after.get(site)
    if ended is not None and ended <= facts.now:
        since = (facts.now - ended).total_seconds()
        text = (
            f"{site} is not connected, and its certificate expired {span(since)} ago: "
            "TLS refuses it before the server can say why"
        )
        return Waiting(site, CERTIFICATE, text, since)
    how = {"stopped": "has stopped", "removed": "was removed by an admin"}.get(view.state)
    when = f", last heard of {span(seen)} ago" if seen is not None else " since the server's start"
    return Waiting(site, "away", f"{site} {how or 'is not connected'}{when}", seen)


def _present(facts: Facts, view: SiteView, refusal: Refusal | None, task: Owed) -> Waiting:
    site = view.name
    if view.last_seen_s is not None and view.last_seen_s > SILENT * facts.heartbeat_s:
        text = f"{site} is silent since {span(view.last_seen_s)}; it counts as dead after "
        return Waiting(site, "silent", text + span(facts.dead_after_s), view.last_seen_s)
    report = next((item for item in view.runs if item[0] == facts.state.run), None)
    if task.what == "answer":
        opened = facts.age(facts.times[0])
        return Waiting(site, "no_answer", f"{site} has not answered the start yet", opened)
    _, number, phase, since = report or (0, 0, "", 0.0)
    doing, _, _ = phase.partition(",")
    if _is_past(facts, number, since):
        phase = doing  # what held it up may be over
    elif _is_of_before(facts, number, since):
        doing += f" in round {number}"
    if crashed := _CRASHED.search(phase):
        text = f"{site}: the run process has {crashed[0]} times in {doing}, then the task fails"
        return Waiting(site, "crashing", text, since)
    if retries := _RETRIES.search(phase):
        full = retries[1] == "resource_exhausted"
        if full and refusal and refusal.code == retries[1] and refusal.time >= task.since:
            text = f"the server has no room for what {site} sends: {refusal.error}{_times(refusal)}"
            return Waiting(site, "disk_full", text, facts.age(refusal.first))
        last = f": {refusal.error}" if refusal and facts.age(refusal.time) <= since + 1 else ""
        what = "has no space or meets a limit" if full else f"tries again ({retries[1]})"
        cause = "disk_full" if full else "retrying"
        text = f"{site} {what} while {doing}{last}"
        return Waiting(site, cause, text, since)
    if refusal and refusal.run == facts.state.run and refusal.time >= task.since:
        cause = "disk_full" if refusal.code == "resource_exhausted" else "refused"
        text = f"{site}: the server refused {refusal.what}: {refusal.error}{_times(refusal)}"
        return Waiting(site, cause, text, facts.age(refusal.first))
    begun = phase not in IDLE_PHASES and (task.what != "train" or number >= facts.state.round)
    if not begun and (had := facts.age(task.since)) <= facts.heartbeat_s + REPORT_S:
        text = f"{site} has its task since {span(had)}, and reports every {span(facts.heartbeat_s)}"
        return Waiting(site, "working", text, had)
    if report is None:
        return Waiting(site, "not_taken", f"{site} is there but reports nothing of the run")
    if not begun:
        text = f"{site} has not begun its task (phase {phase}, round {number})"
        return Waiting(site, "not_taken", text, since)
    return _at_work(facts, site, phase, since, task)


def _is_of_before(facts: Facts, number: int, since: float) -> bool:
    """Return whether a report is of a round before the open one.

    While it downloads the model of a round, a site still reports the number of the one before.
    """
    current = facts.state.open_round
    if current is None or current.closed or number >= current.opened.round:
        return False
    return since > facts.age(facts.times[facts.index_of_phase])


def _is_past(facts: Facts, number: int, since: float) -> bool:
    """Return whether a report is of an earlier round, and a newer report is still to come."""
    had = facts.age(facts.times[facts.index_of_phase])
    return had <= facts.heartbeat_s + REPORT_S and _is_of_before(facts, number, since)


def _at_work(facts: Facts, site: str, phase: str, since: float, task: Owed) -> Waiting:
    current = facts.state.open_round
    text = f"{site}: {phase} since {span(since)}"
    if task.what != "train" or current is None:
        return Waiting(site, "working", text, since)
    took = facts.age(task.since)
    normal, basis = usual(task.took, site, current.opened.round)
    if not normal:
        return Waiting(site, "working", text, since)
    text += f"; {span(took)} in the round, {basis} took {span(normal)}"
    return Waiting(site, "slow" if took > SLOW * normal else "working", text, since)


def _times(refusal: Refusal) -> str:
    return f" ({refusal.times} times)" if refusal.times > 1 else ""


def site_lines(facts: Facts, waits: Iterable[Waiting]) -> list[Line]:
    """Return what sites last reported, and what they met, with times."""
    lines = []
    for item in list(waits)[:MAX_SITES]:
        site, view = item.site, facts.sites.get(item.site)
        lines += report_lines(facts, view) if view else []
        if view and view.last_seen_s is not None and item.cause in ("silent", "away", CERTIFICATE):
            lines.append(Line(facts.before(view.last_seen_s), f"{site} last seen"))
        if view and view.last_seen_s is not None and item.cause == "silent":
            dead = facts.before(view.last_seen_s - facts.dead_after_s)[11:19]
            text = f"{site} missed its heartbeat; counted dead at {dead}"
            lines.append(Line(facts.before(view.last_seen_s - facts.heartbeat_s), text))
        refusal = facts.refused(site, facts.state.run) or facts.refused(site, None)
        if refusal and refusal.time >= facts.times[0]:  # an older one is of another run
            text = f"{site}: {refusal.what} was refused{_times(refusal)}: {refusal.error}"
            lines.append(Line(refusal.time, text))
    return lines


def report_lines(facts: Facts, view: SiteView) -> list[Line]:
    """Return what a site last reported of the run, unless that is of a round that is over."""
    return [
        Line(facts.before(since), f"{view.name} began: {phase}, round {number}")
        for run, number, phase, since in view.runs
        if run == facts.state.run and not _is_past(facts, number, since)
    ]
