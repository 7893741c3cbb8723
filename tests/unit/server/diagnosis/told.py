"""Facts around a played run: the log has one second between events, unless told otherwise."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from flplatform.core.control import SiteView
from flplatform.core.errors import FLError
from flplatform.core.workflow import Roster
from flplatform.server.diagnosis.facts import Facts, stamp
from flplatform.server.refusals import Refusals
from tests.support.control import site
from tests.support.workflows import RUN, Played

BEGIN = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


def live(name: str, phase: str = "train", since: float = 1.0, number: int = 1) -> SiteView:
    """A site that has reported what it does in the run."""
    return site(name, runs=((RUN, number, phase, since),))


def told(
    played: Played,
    *,
    ago: float = 0.0,
    times: Mapping[int, float] | None = None,
    views: Mapping[str, SiteView | None] | None = None,
    timers: Mapping[str, float] | None = None,
    refusals: Refusals | None = None,
    **changes: Any,
) -> Facts:
    """Return the facts of a run.

    Args:
        ago: seconds since the last event.
        times: index of an event → its seconds from the beginning.
        views: site → how it is; the others are live and train; None for one that never registered.
        timers: running timer → seconds left; default all that run, in full.
    """
    seconds = {i: float(i) for i in range(len(played.events))} | dict(times or {})
    end = BEGIN + timedelta(seconds=max(seconds.values()))
    sites = {name: live(name) for name in played.sites} | dict(views or {})
    present = {name: view for name, view in sites.items() if view is not None}
    up = {name for name, view in present.items() if view.state in ("live", "expected")}
    barred = {name for name, view in present.items() if view.state == "disabled"}
    return Facts(
        now=end + timedelta(seconds=ago),
        state=played.state,
        events=played.events,
        times=[stamp(BEGIN + timedelta(seconds=seconds[i])) for i in range(len(played.events))],
        sites=present,
        roster=Roster(frozenset(up), frozenset(barred)),
        timers=played.wakes if timers is None else timers,
        refused=(refusals or Refusals()).last,
        **{
            "troubles": {},
            "not_after": {},
            "heartbeat_s": 5.0,
            "dead_after_s": 60.0,
        }
        | changes,
    )


def refused(site: str, what: str, error: FLError, at: datetime, times: int = 1) -> Refusals:
    """A memory of one refusal, met so many times."""
    refusals = Refusals(lambda: stamp(at))
    for _ in range(times):
        refusals.note(site, what, error)
    return refusals
