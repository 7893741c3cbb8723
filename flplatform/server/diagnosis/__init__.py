"""`why`: what runs, rounds and sites wait for, drawn from the log, the sites and refusals."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from flplatform.core import events as ev
from flplatform.core.control import SiteView
from flplatform.core.diagnosis import Coming, Diagnosis, Line, Waiting
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import SITE_NAME
from flplatform.server.client_manager import ClientManager
from flplatform.server.diagnosis.facts import Facts, Surroundings, span
from flplatform.server.diagnosis.outlook import remedies
from flplatform.server.diagnosis.parted import lost, parting
from flplatform.server.diagnosis.rounds import why_round
from flplatform.server.diagnosis.runs import why_run
from flplatform.server.diagnosis.sites import absent, owed, report_lines, site_lines, waiting
from flplatform.server.refusals import Refusals
from flplatform.server.run_actor import RunActor
from flplatform.server.runs import Runs
from flplatform.server.wording import describe

__all__ = ["Diagnostics", "Facts", "why_round", "why_run"]

SOON_DAYS = 30.0
"""A certificate with fewer days left is worth a word."""


class Diagnostics:
    """Implements `core.diagnosis.DiagnosisControl`; lives on the event loop.

    Args:
        runs: the runs and their logs.
        clients: who is there.
        sites: returns every site as operators see it.
        refusals: what was refused to sites.
        heartbeat_s: how often a site speaks.
    """

    def __init__(
        self,
        runs: Runs,
        clients: ClientManager,
        sites: Callable[[], Sequence[SiteView]],
        refusals: Refusals,
        heartbeat_s: float,
    ) -> None:
        self._runs = runs
        self._clients = clients
        self._sites = sites
        self._refusals = refusals
        self._heartbeat_s = heartbeat_s

    def run(self, number: int) -> Diagnosis:
        """Say what a run waits for, or how it ended.

        Raises:
            NotFoundError: no such run.
            UnavailableError: its log cannot be read, and why.
        """
        return why_run(self._facts(self._runs.view(number)))

    def round(self, number: int, round_number: int) -> Diagnosis:
        """Say who was in a round and why it is open or closed.

        Raises:
            NotFoundError: no such run or round.
        """
        return why_round(self._facts(self._runs.view(number)), round_number)

    def site(self, name: str) -> Diagnosis:
        """Say where a site is and what it does.

        Raises:
            InvalidArgumentError: that is no name of a site.
        """
        if not SITE_NAME.match(name):
            raise InvalidArgumentError(f"{name[:80]!r} is not a site name", field="what")
        view = next((site for site in self._sites() if site.name == name), None)
        about = [self._facts(actor) for actor in self._runs.active()]
        mine = [facts for facts in about if name in facts.targets]
        if view is None or view.state != "live":
            return self._not_at_work(name, view, mine)
        owing = [(facts, what) for facts in mine if (what := _owes(facts, name))]
        found = [(facts, waiting(facts, name, owed(facts, what))) for facts, what in owing]
        lines = [line for facts, item in found for line in site_lines(facts, [item])]
        lines += [line for facts in mine for line in report_lines(facts, view)]
        without = [facts for facts in mine if name in lost(facts)]
        anew = [each for facts in without for each in remedies(facts, name, has_lost=True)]
        apart = [facts for facts in mine if parting(facts, name)]
        anew += [each for facts in apart for each in remedies(facts, name)]
        about_run = without[0] if without else found[0][0] if found else None
        return Diagnosis(
            headline=_at_work(name, mine, without, found),
            cause="run_lost" if without else found[0][1].cause if found else "idle",
            run=about_run.state.run if about_run else None,
            waits_for=tuple(item for _, item in found),
            lines=_in_order([*lines, *self._facts_of(name, view, mine)]),
            can=(*anew, *(f"why {facts.state.run}" for facts, _ in found)),
            ask=(name,),
        )

    def _not_at_work(self, name: str, view: SiteView | None, mine: Sequence[Facts]) -> Diagnosis:
        refusal = self._refusals.last(name)
        lines = self._facts_of(name, view, mine)
        coming: tuple[Coming, ...] = ()
        if view is not None and view.state == "disabled":
            live = self._clients.get(name) is not None
            there = "it is connected" if live else "it is not connected"
            item = Waiting(name, "disabled", f"{name} is disabled, no run gives it tasks; {there}")
            return Diagnosis(item.text, "disabled", lines=lines, can=(f"enable_client {name}",))
        item = absent(self._around(), name, view, refusal)
        if item.cause == "expected" and self._clients.dead_after_s:
            text = f"{name} counts as gone once {span(self._clients.dead_after_s)} have passed"
            coming = (Coming("", self._clients.dead_after_s, text),)
        return Diagnosis(
            headline=item.text,
            cause=item.cause,
            run=mine[0].state.run if mine else None,
            waits_for=(item,),
            lines=lines,
            next=coming,
            can=tuple(f"why {facts.state.run}" for facts in mine if _owes(facts, name)),
        )

    def _facts_of(
        self, name: str, view: SiteView | None, mine: Sequence[Facts]
    ) -> tuple[Line, ...]:
        """Return what is known of a site itself: last seen, certificate, refusals, its runs."""
        bare, lines = self._around(), []
        if view is not None and view.last_seen_s is not None:
            lines.append(Line(bare.before(view.last_seen_s), f"{name} last seen"))
        refusal = self._refusals.last(name)
        if refusal is not None:
            times = f" ({refusal.times} times)" if refusal.times > 1 else ""
            text = f"{name}: {refusal.what} was refused{times}: {refusal.error}"
            lines.append(Line(refusal.time, text))
        for facts in mine:
            lines += _told(facts, name)
        days = view.certificate_days if view else None
        ends = self._clients.not_after.get(name)
        if days is None and ends is not None:
            days = (ends - datetime.now(UTC)).total_seconds() / 86400
        if days is not None:
            hurry = ": renew it" if days < SOON_DAYS else ""
            lines.append(Line("", f"its certificate is valid for {days:.0f} days{hurry}"))
        return _in_order(lines)

    def _around(self) -> Surroundings:
        return Surroundings(**self._common())

    def _facts(self, actor: RunActor) -> Facts:
        now = asyncio.get_running_loop().time()
        return Facts(
            **self._common(),
            state=actor.state,
            events=actor.events,
            times=actor.times,
            timers={wake: at - now for wake, at in actor.wakes_at.items()},
            troubles=dict(actor.troubles),
        )

    def _common(self) -> dict[str, Any]:
        return {
            "now": datetime.now(UTC),
            "sites": {site.name: site for site in self._sites()},
            "roster": self._clients.roster(),
            "refused": self._refusals.last,
            "not_after": self._clients.not_after,
            "heartbeat_s": self._heartbeat_s,
            "dead_after_s": self._clients.dead_after_s,
        }


def _owes(facts: Facts, site: str) -> str:
    """Return what a run waits for from a site: `answer`, `train`, `result`, or nothing."""
    state, current = facts.state, facts.state.open_round
    if site not in state.taking_part:
        return ""
    if site not in state.answers:
        return "answer"
    if current is not None:
        return "train" if not current.closed and site in current.unsettled else ""
    for gather in state.gathers.values():
        if not gather.closed and site in gather.opened.participants:
            settled = {task_id.site for task_id in (*gather.results, *gather.failed)}
            return "" if site in settled and len(gather.opened.models) < 2 else "result"
    return ""


def _at_work(
    name: str,
    mine: Sequence[Facts],
    without: Sequence[Facts],
    found: Sequence[tuple[Facts, Waiting]],
) -> str:
    if not mine:
        return f"{name} is connected and idle: no active run has it as a target"
    said = [f"it has lost run {each.state.run} and fails each task of it" for each in without]
    said += [f"run {each.state.run} waits for {item.clause}" for each, item in found]
    owes = "" if said else " and owes nothing now"
    if not said:
        said = [f"it {text}" for each in mine if (text := parting(each, name))]
        runs = ", ".join(str(each.state.run) for each in mine if not parting(each, name))
        said += [f"it is a target of run {runs}"] if runs else []
    return f"{name} is connected{owes}; {'; '.join(said)}"


def _told(facts: Facts, site: str) -> list[Line]:
    """Return what the log last says of a site: its answer, last failure, update, withdrawal."""
    last: dict[type[ev.Event], Line] = {}
    for event, time in zip(facts.events, facts.times, strict=True):
        told = ev.SiteAnswered | ev.TaskFailed | ev.UpdateAccepted | ev.SiteWithdrawn
        if isinstance(event, told) and event.site == site:
            last[type(event)] = Line(time, f"run {facts.state.run}: {describe(event)}")
    return list(last.values())


def _in_order(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(sorted(dict.fromkeys(lines), key=lambda line: line.time))
