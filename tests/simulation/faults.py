"""What goes wrong and what operators do: drawn before a history begins, so that it can shrink."""

import random
from dataclasses import dataclass, replace
from typing import Any

SITE_FAULTS = (
    "site kill",
    "site host crash",
    "site killed at its disk",
    "site killed at a step",
    "site frozen",
    "cut both ways",
    "cut up",
    "cut down",
    "flapping",
    "lossy",
    "doubling",
    "slow",
    "refused",
    "connections broken",
)
SERVER_FAULTS = (
    "server kill",
    "server host crash",
    "server killed at its disk",
    "server killed at a step",
    "server frozen",
    "server disk full",
    "server EIO",
)
DISK_FAULTS = ("site disk full", "site EIO", "server EIO at blobs")
"""They fail tasks and aggregations for good."""

OPERATORS = (
    "abort",
    "withdraw",
    "add targets",
    "abort tasks",
    "set quorum",
    "disable",
    "enable",
    "delete",
)
CHANGING = ("start anew", "start anew", "leave")
ERRANDS = ("validate", "validate", "prepare", "unstage", "bar")
"""What operators pursue until it is done, see `operators`; and what of that changes results."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens: when, what, to whom, how long, and a number for choices."""

    at: float
    kind: str
    site: str
    length: float
    number: int

    def __str__(self) -> str:
        return f"{self.at:8.3f} {self.kind} ({self.site}, {self.length:.1f} s, {self.number})"


def draw(
    rng: random.Random, sites: list[str], horizon: float, count: int, reproducible: bool
) -> list[Fault]:
    """Draw a schedule.

    Args:
        rng: decides.
        sites: all sites.
        horizon: when the last one begins at the latest.
        count: how many.
        reproducible: leave out what changes the result by right.
    """
    kinds = [*SITE_FAULTS, *SERVER_FAULTS]
    if not reproducible:
        kinds += [*DISK_FAULTS, *OPERATORS]
    few = rng.sample(kinds, rng.randint(2, len(kinds)))  # every history has its own mixture
    return sorted(
        (
            Fault(
                at=rng.random() * horizon,
                kind=rng.choice(few),
                site=rng.choice(sites),
                length=min(120.0, rng.expovariate(1 / 15.0)),
                number=rng.randint(1, 400),
            )
            for _ in range(count)
        ),
        key=lambda fault: fault.at,
    )


def draw_errands(
    rng: random.Random, sites: list[str], horizon: float, reproducible: bool
) -> list[Fault]:
    """Draw what operators pursue: nothing in every other history.

    Args:
        rng: decides.
        sites: all sites.
        horizon: when the last one begins at the latest.
        reproducible: leave out what changes the result by right.
    """
    kinds = ERRANDS if reproducible else CHANGING + ERRANDS
    return [
        Fault(
            at=rng.random() * horizon,
            kind=rng.choice(kinds),
            site=rng.choice(sites),
            length=0.0,
            number=rng.randint(1, 400),
        )
        for _ in range(rng.choice([0, 0, 0, 1, 2, 4]))
    ]


class Injector:
    """Carries faults out."""

    def __init__(self, history: Any) -> None:
        self._history = history
        self._fresh: set[str] = set()  # heard of shortly before the server was frozen

    def __call__(self, fault: Fault) -> None:
        """Do it now."""
        history = self._history
        if fault.kind == "server frozen":  # often for longer than it takes a site to be dead
            fault = replace(fault, length=min(120.0, 3 * fault.length))
        history.world.note(
            "fault", f"⚡ {fault.kind} {fault.site} {fault.length:.1f} {fault.number}"
        )
        history.world.count(fault.kind)
        if fault.kind in OPERATORS + CHANGING + ERRANDS:
            history.operators.command(fault)
            return
        who = "server" if fault.kind.startswith("server ") else fault.site
        history.watcher.attendance.disturb(who, fault.length)
        if fault.kind.startswith("server "):
            self._hurt(history.server, fault, fault.kind.removeprefix("server "))
        elif fault.kind.startswith("site "):
            self._hurt(history.sites[fault.site], fault, fault.kind.removeprefix("site "))
        else:
            self._wire(fault)

    def _hurt(self, victim: Any, fault: Fault, what: str) -> None:
        later = self._history.network.later
        process, host = victim.up, victim.host
        who = "server" if victim is self._history.server else fault.site
        if what == "disk full":
            host.full = True
            later(fault.length, setattr, host, "full", False)
        elif what == "EIO" and fault.kind == "server EIO":
            host.log_broken = True
        elif what.startswith("EIO"):
            host.broken = True
        elif process is None:
            if what == "host crash":
                victim.crash(host=True)
        elif what == "kill":
            victim.crash(host=False)
        elif what == "host crash":
            victim.crash(host=True)
        elif what == "killed at its disk":
            process.touches = 1 + fault.number % 120
        elif what == "killed at a step":
            process.steps = fault.number
        elif what == "frozen":
            if who == "server" and not process.frozen:
                self._fresh = victim.fresh()
            process.frozen = True
            later(fault.length, self._thaw, who, victim, process)

    def _thaw(self, who: str, victim: Any, process: Any) -> None:
        """Let it go on; whichever of several freezes is over first ends them all."""
        if who == "server" and process.frozen:
            self._history.network.later(1.0, self._remembers, victim, process, self._fresh)
        process.thaw()

    def _remembers(self, server: Any, process: Any, fresh: set[str]) -> None:
        """See that a standstill of the server is nobody's silence."""
        if server.up is process and not process.frozen:
            lost = fresh - server.clients.live() - server.clients.parted.keys()
            for site in sorted(lost):
                self._history.watcher.object(f"{site} was dropped for a standstill of the server")

    def _wire(self, fault: Fault) -> None:
        network = self._history.network
        link, until = network.links[fault.site], network.world.loop.now + fault.length
        if fault.kind == "connections broken":
            network.break_connections(fault.site)
        elif fault.kind == "flapping":
            link.cut_up = link.cut_down = network.world.loop.now + 1.0
            if fault.length > 3.0:
                rest = Fault(fault.at, fault.kind, fault.site, fault.length - 3.0, fault.number)
                network.later(3.0, self._wire, rest)
        else:
            for name in {
                "cut both ways": ("cut_up", "cut_down"),
                "cut up": ("cut_up",),
                "cut down": ("cut_down",),
                "lossy": ("lossy",),
                "doubling": ("doubling",),
                "slow": ("slow",),
                "refused": ("refused",),
            }[fault.kind]:
                setattr(link, name, until)
