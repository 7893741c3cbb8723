"""What an explanation is drawn from: values only, so that explaining is a pure function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median

from flplatform.algorithms.workflows import RunState
from flplatform.core import events as ev
from flplatform.core.control import SiteView
from flplatform.core.diagnosis import Line
from flplatform.core.workflow import Roster
from flplatform.server.refusals import Refusal
from flplatform.server.wording import describe

MAX_NAMES = 4
MAX_LINES = 12
"""Lines of the log in one explanation: it must stay on one screen."""

RECENT_ROUNDS = 10
"""Rounds that tell how long one usually takes; a log may hold very many."""

MAX_SITES = 5
"""Sites that are waited for and explained one by one; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The sites at one moment.

    Attributes:
        now: UTC.
        sites: every site that has ever registered.
        refused: (site, run or None) → the last refusal.
        not_after: site → when its certificate ends, where that is known.
        heartbeat_s, dead_after_s: how often a site speaks, and when it counts as dead.
    """

    now: datetime
    sites: Mapping[str, SiteView]
    roster: Roster
    refused: Callable[[str, int | None], Refusal | None]
    not_after: Mapping[str, datetime]
    heartbeat_s: float
    dead_after_s: float

    def age(self, time: str) -> float:
        """Return the seconds since a time."""
        return max(0.0, (self.now - datetime.fromisoformat(time)).total_seconds())

    def before(self, seconds: float) -> str:
        """Return the time so many seconds ago; negative ones lie ahead."""
        return stamp(self.now - timedelta(seconds=seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Surroundings):
    """One run among the sites.

    Attributes:
        events, times: the run's log; times are UTC, ISO 8601.
        timers: running timer → seconds that are left.
        troubles: what waits at the server → since when, the error, and the cause.
    """

    state: RunState
    events: Sequence[ev.Event]
    times: Sequence[str]
    timers: Mapping[str, float]
    troubles: Mapping[str, tuple[str, str, str]]

    @property
    def targets(self) -> tuple[str, ...]:
        """The sites that the run is meant for."""
        return self.state.targets

    @property
    def index_of_phase(self) -> int:
        """Where the log stands at the beginning of what is done now."""
        state = self.state
        if state.ended or state.step < 0:
            return 0
        if state.open_round is not None:
            return self.index(ev.RoundOpened)
        if any(not gather.closed for gather in state.gathers.values()):
            return self.index(ev.GatherOpened)
        return self.index(ev.ModelPublished, ev.StepStarted)

    def index(self, *kinds: type[ev.Event]) -> int:
        """Return where the last event of some kinds stands in the log; 0 if there is none."""
        found = (i for i in reversed(range(len(self.events))) if isinstance(self.events[i], kinds))
        return next(found, 0)


def stamp(moment: datetime) -> str:
    """Return a time as the log writes it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def span(seconds: float) -> str:
    """Return seconds as people read them: `1.2 s`, `14 min`, `3 h 5 min`, `2 d`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d"


def names(sites: Iterable[str]) -> str:
    """Return a few names, and how many more there are."""
    found = list(sites)
    if len(found) <= MAX_NAMES:
        return ", ".join(found)
    return f"{', '.join(found[: MAX_NAMES - 1])} and {len(found) - MAX_NAMES + 1} more"


def log_lines(facts: Facts, start: int, limit: int = MAX_LINES) -> list[Line]:
    """Return the log in words from an event on: the first, and the last ones."""
    chosen = list(range(start, len(facts.events)))
    left_out = len(chosen) - limit
    if left_out > 0:
        chosen = [start, *chosen[left_out + 1 :]]
    lines = [Line(facts.times[i], describe(facts.events[i])) for i in chosen]
    if left_out > 0:
        lines.insert(1, Line(facts.times[start + left_out], f"… {left_out} events before this …"))
    return lines


def answered_after(facts: Facts, start: int = 0) -> dict[str, dict[int, float]]:
    """Return for each site how long its updates took: round → seconds since the opening.

    Args:
        facts: the run.
        start: where in the log to begin.
    """
    opened: dict[int, datetime] = {}
    took: dict[str, dict[int, float]] = {}
    for event, time in zip(facts.events[start:], facts.times[start:], strict=True):
        if isinstance(event, ev.RoundOpened):
            opened[event.round] = datetime.fromisoformat(time)
        elif isinstance(event, ev.UpdateAccepted) and event.round in opened:
            seconds = (datetime.fromisoformat(time) - opened[event.round]).total_seconds()
            took.setdefault(event.site, {})[event.round] = seconds
    return took


def recent(facts: Facts) -> int:
    """Return where the log of the last few rounds begins."""
    first = facts.state.round - RECENT_ROUNDS
    for index in reversed(range(len(facts.events))):
        event = facts.events[index]
        if isinstance(event, ev.RoundOpened) and event.round <= first:
            return index
    return 0


def usual(took: Mapping[str, Mapping[int, float]], site: str, number: int) -> tuple[float, str]:
    """Return how long a round usually takes a site, and what that is drawn from; 0.0 if unknown."""
    own = [seconds for at, seconds in took.get(site, {}).items() if at < number]
    if own:
        return median(own), f"its {len(own)} earlier rounds" if own[1:] else "its earlier round"
    others = [by[number] for by in took.values() if number in by]
    if others:
        return median(others), "the other sites in this round"
    return 0.0, ""
