"""`dashboard`: a run on one screen, and the verb that feeds it."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flplatform.admin import views
from flplatform.admin.modules.training import Story
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import RunArguments
from flplatform.core.control import RoundMetrics
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import CommandSpec, Connection, argument

FEED = "dashboard_feed"

SHORTEST_S, LONGEST_S = 0.25, 2.0
"""Pauses between two pictures: a run that changes all the time, and one that does not."""

MAX_RUNS, MAX_ROUNDS, MAX_SITES, MAX_NEWS = 30, 300, 500, 200
"""How much of each a picture holds: the latest, but of rounds an even choice."""


@dataclass(frozen=True)
class FeedArguments:
    """Of `dashboard_feed`."""

    run: int = argument(help="the run's number", complete="run", minimum=1)


class DashboardModule:
    """Pictures of a run.

    Args:
        control: sees the federation.
        rights: decides which sites are shown.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, rights: Rights) -> None:
        self._control = control
        self._rights = rights

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="dashboard",
                summary="shows a run on one screen that follows it",
                arguments=RunArguments,
                handler=_console_only,
                permission="view",
                mutating=False,
                examples=("dashboard", "dashboard 3"),
                needs=("a terminal", "the extra flplatform[dashboard] at the console"),
                local="dashboard",
            ),
            CommandSpec(
                name=FEED,
                summary="sends pictures of a run for the dashboard",
                arguments=FeedArguments,
                handler=self._feed,
                permission="view",
                mutating=False,
                examples=("dashboard_feed 3",),
                transient=True,
            ),
        ]

    async def _feed(self, connection: Connection, args: FeedArguments) -> None:
        story, seen = Story(), 0
        while True:
            await connection.data("picture", self._picture(args.run, story))
            await asyncio.sleep(SHORTEST_S)
            if self._control.run(args.run).ended:
                await asyncio.sleep(LONGEST_S - SHORTEST_S)
                continue
            try:
                async with asyncio.timeout(LONGEST_S - SHORTEST_S):
                    seen = await self._control.wait_changed(args.run, seen)
            except TimeoutError:
                pass  # sites report their progress without an event of the run

    def _picture(self, number: int, story: Story) -> dict[str, Any]:
        """All that the screen shows, and the lines of the story that are new since the last."""
        run, rounds = self._control.run(number), self._control.metrics(number)
        listed = self._control.runs()[-MAX_RUNS:]
        return {
            "server": asdict(self._control.server()),
            "runs": [
                {"run": each.run, "name": each.name, "status": each.status} for each in listed
            ],
            "run": views.of_run(run) | {"timers": dict(run.timers)},
            "rounds": [
                {"round": each.round, "score": each.score, "best": each.best}
                for each in _thinned(rounds)
            ],
            "last_scores": _last_scores(rounds, run.metric),
            "sites": self._sites(run.targets),
            "news": story.news(run, rounds)[-MAX_NEWS:],
        }

    def _sites(self, targets: Sequence[str]) -> list[dict[str, Any]]:
        """Those that the user may see: the run's targets first."""
        known = {site.name: site for site in self._control.sites()}
        names = [*targets, *(name for name in known if name not in targets)]
        sites = []
        for name in names[:MAX_SITES]:
            site = known.get(name)
            organisation = site.organisation if site else ""
            if not self._rights.decide_at(
                ordered().signer, "view", "check_status", organisation
            ).allowed:
                continue
            sites.append(
                {
                    "name": name,
                    "state": site.state if site else "unknown",
                    "last_seen_s": site.last_seen_s if site else None,
                    "runs": [list(report) for report in site.runs] if site else [],
                }
            )
        return sites


def _thinned(rounds: Sequence[RoundMetrics]) -> Sequence[RoundMetrics]:
    """As many rounds as a curve has points, evenly, the last of them included."""
    step = -(-len(rounds) // MAX_ROUNDS) or 1
    return rounds[(len(rounds) - 1) % step :: step]


def _last_scores(rounds: Sequence[RoundMetrics], metric: str) -> dict[str, float]:
    """What each site last measured, or reported while training."""
    found: dict[str, float] = {}
    for each in rounds:
        for reports in (each.training, each.sites):
            found |= {site: said[metric] for site, said in reports.items() if metric in said}
    return found


async def _console_only(_: Connection, __: RunArguments) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
