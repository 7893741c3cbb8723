"""Who takes part: asked sites answer, there ones work, and who has left keeps nothing."""

import json
from dataclasses import dataclass, field
from typing import Any

from flplatform.core import events as ev
from tests.simulation.disk import Disks, File, Folder
from tests.simulation.world import Process, World

ANSWER_S = 30.0
"""So soon a site that is asked to start has downloaded the package and answered, undisturbed."""

LEAVE_S = 15.0
"""So soon a site that has no part any more keeps nothing, undisturbed."""

RECOVERY_S = 80.0
"""So long something that went wrong may make itself felt: longer than a lost call waits."""


@dataclass
class Roll:
    """The targets of a run, by its log.

    Attributes:
        asked: who has not answered yet → since when.
        inside: who has accepted.
        outside: who was withdrawn or declined → since when.
    """

    asked: dict[str, float] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    outside: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    def take(self, event: ev.Event, now: float) -> None:
        """Take the next event of the run."""
        match event:
            case ev.RunOpened() | ev.TargetsAdded():
                for site in event.sites:
                    self.asked[site] = now
                    self.outside.pop(site, None)
                    self.inside.discard(site)
            case ev.SiteAnswered():
                self.asked.pop(event.site, None)
                if event.accepted:
                    self.inside.add(event.site)
                else:
                    self.outside[event.site] = now
            case ev.SiteWithdrawn():
                self.asked.pop(event.site, None)
                self.inside.discard(event.site)
                self.outside[event.site] = now
            case ev.RunEnded():
                self.ended = True


class Attendance:
    """Looks at the sites while a history goes on.

    Attributes:
        processes: those of jobs that run → process of the site, and run.
    """

    def __init__(self, world: World, disks: Disks, object_to: Any) -> None:
        self.world = world
        self.processes: dict[Any, tuple[Process, int]] = {}
        self._disks = disks
        self._object = object_to
        self._rolls: dict[int, Roll] = {}
        self._disturbed: dict[str, float] = {}
        self._disabled: set[str] = set()
        self._made: dict[bytes, set[str]] = {}

    # ---- peace ----

    def disturb(self, who: str, length: float = 0.0) -> None:
        """Note that something goes wrong at a site or the server."""
        until = self.world.loop.now + length
        self._disturbed[who] = max(until, self._disturbed.get(who, 0.0))

    def _overdue(self, site: str, since: float, prompt_s: float = ANSWER_S) -> bool:
        """Return whether a site must have done by now what it had to do since then."""
        if site in self._disabled:
            return False
        peace = max(self._disturbed.get(site, 0.0), self._disturbed.get("server", 0.0))
        if peace + RECOVERY_S < since:
            return self.world.loop.now > since + prompt_s
        return self.world.loop.now > max(since, peace) + prompt_s + RECOVERY_S

    # ---- what the log says ----

    def bar(self, event: ev.Event) -> None:
        """See an event of the federation become durable."""
        match event:
            case ev.SiteDisabled():
                self._disabled.add(event.site)
            case ev.SiteEnabled():
                self._disabled.discard(event.site)
                self.disturb(event.site)

    def take(self, run: int, event: ev.Event) -> None:
        """See an event of a run become durable."""
        roll = self._rolls.setdefault(run, Roll())
        if isinstance(event, ev.UpdateAccepted | ev.ResultAccepted):
            assert event.site in roll.inside, "the result of a site that has no part counts"
        if isinstance(event, ev.RoundOpened):
            for site in sorted(roll.inside - set(event.participants)):
                assert not self._overdue(site, 0.0), f"{site} is there and has no part in a round"
        before = dict(roll.outside)
        roll.take(event, self.world.loop.now)
        if isinstance(event, ev.SiteAnswered) and event.accepted:
            self.world.count("start accepted")
        if isinstance(event, ev.TargetsAdded) and before.keys() & set(event.sites):
            self.world.count("started anew")

    # ---- what sites do ----

    def look(self, sites: Any) -> None:
        """Compare what each site has with what the log says."""
        for run, roll in self._rolls.items():
            if roll.ended:
                continue
            for site, since in roll.asked.items():
                if self._overdue(site, since):
                    self._object(f"{site} was asked to start run {run} and has not answered")
            for site, since in roll.outside.items():
                over = self._overdue(site, since, LEAVE_S)
                if over and (left := self._left(sites[site], run)):
                    self._object(f"{site} has no part in run {run} any more and keeps {left}")

    def final(self, sites: Any) -> None:
        """Look at all sites when all is quiet: nothing is left of any run."""
        for site in sites.values():
            for run in self._rolls:
                if left := self._left(site, run):
                    self._object(f"{site.name} keeps {left} of run {run}, which is over")

    def _left(self, site: Any, run: int) -> str:
        """Return what a site has of a run; empty for nothing."""
        program = site.program
        if program is None:
            return ""
        if run in program.runs:
            return "the run"
        if any(key.startswith(f"{run}/") for key in program._tasks._workers):
            return "a worker"
        if any(at == (site.up, run) for at in self.processes.values()):
            return "a process"
        state = f"/{site.name}/state"
        folder = self._disks.find(f"{state}/runs/run-{run}")[1]
        # One that was not resumed is kept: what was in its way may be mended.
        if isinstance(folder, Folder) and "start.json" not in folder.entries:
            return "a folder"
        spool = self._disks.find(f"{state}/spool/entries")[1]
        assert isinstance(spool, Folder)
        return "a result" if any(name.startswith(f"{run},") for name in spool.entries) else ""

    # ---- states ----

    def trains(self, folder: Any, before: bytes) -> None:
        """See a run's code train from a state: it must be one that this very start has made."""
        start = self._start(folder)
        if start and before and start not in self._made.get(before, ()):
            self._object(f"{folder} is trained from a state of another start")

    def trained(self, folder: Any, after: bytes) -> None:
        """See a run's code make a state."""
        self._made.setdefault(after, set()).add(self._start(folder))

    def _start(self, folder: Any) -> str:
        """Return the submission that a run's folder is of; empty if there is none any more."""
        node = self._disks.find(f"{folder}/start.json")[1]
        return str(json.loads(node.data)["submission_id"]) if isinstance(node, File) else ""
