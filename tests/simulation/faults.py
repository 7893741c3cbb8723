"""What goes wrong and what operators do: drawn before a history begins, so that it can shrink."""

import random
from dataclasses import dataclass
from typing import Any

from flplatform.core.errors import FLError
from flplatform.core.workflow import Abort, AbortTasks, AddTargets, SetQuorum, Withdraw
from tests.simulation.site import encoded, start_order

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


class Injector:
    """Carries faults out."""

    def __init__(self, history: Any) -> None:
        self._history = history

    def __call__(self, fault: Fault) -> None:
        """Do it now."""
        history = self._history
        history.world.note(
            "fault", f"⚡ {fault.kind} {fault.site} {fault.length:.1f} {fault.number}"
        )
        history.world.count(fault.kind)
        if fault.kind in OPERATORS:
            self._operate(fault)
        elif fault.kind.startswith("server "):
            self._hurt(history.server, fault, fault.kind.removeprefix("server "))
        elif fault.kind.startswith("site "):
            self._hurt(history.sites[fault.site], fault, fault.kind.removeprefix("site "))
        else:
            self._wire(fault)

    def _hurt(self, victim: Any, fault: Fault, what: str) -> None:
        later = self._history.network.later
        process, host = victim.up, victim.host
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
            process.frozen = True
            later(fault.length, process.thaw)

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

    # ---- operators ----

    def _operate(self, fault: Fault) -> None:
        server = self._history.server
        if server.up is not None:
            server.up.spawn(self._command(fault))

    async def _command(self, fault: Fault) -> None:
        history = self._history
        runs = history.server.runs
        world = history.world
        try:
            if fault.kind in ("disable", "enable"):
                await runs.set_enabled(fault.site, fault.kind == "enable", "operator")
                return
            numbers = [summary.run for summary in runs.summaries()]
            if not numbers:
                return
            number = numbers[fault.number % len(numbers)]
            if fault.kind == "delete":
                await history.server.lifecycle.delete(number, "operator")
                return
            actor = runs.actor(number)
            sites = (fault.site,)
            given: Any
            match fault.kind:
                case "abort":
                    given = Abort("operator", "aborted")
                case "withdraw":
                    given = Withdraw(sites, "operator")
                case "abort tasks":
                    given = AbortTasks(sites, "operator")
                case "set quorum":
                    given = SetQuorum(1 + fault.number % len(history.sites), "operator")
                case _:
                    again = f"{fault.number:032x}"
                    digest = actor.state.opened.job_blob.digest
                    given = AddTargets(sites, encoded(start_order(again, digest, sites)), "o")
            events = await actor.tell(given)
        except FLError as error:
            world.note("operator", f"refused: {error}")
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, a command must not meet it
            history.watcher.object(f"a command: {error!r}")
            return
        world.count("command obeyed")
        stored = history.server.log.run(number)
        if missing := [event for event in events if event not in stored]:
            history.watcher.object(f"I1: obeyed and not stored: {missing[0]}")
