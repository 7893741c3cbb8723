"""`why` at a site: what a run does here now, and its last errors."""

import asyncio
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from flplatform.client.troubles import Troubles
from flplatform.client.verbs import Asked, Body, SiteVerb, everyone
from flplatform.core.strict import FromNewer, parse_json

Report = tuple[int, int, str, float, str]
"""Run, round, phase, seconds in it, isolation."""


class WhyBody(FromNewer):
    """What the server adds: the run that the question is about, 0 for none."""

    run: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class Reporting(Protocol):
    """Knows this site's runs; see `client.site_runs.SiteRuns`."""

    def reports(self) -> Iterable[Report]:
        """Return what each run is doing."""

    def troubles(self, run: int) -> Troubles:
        """Return what went wrong in a run, also after its end."""


def why_verb(runs: Reporting, downloads: Troubles, folder: Path) -> SiteVerb:
    """Return the verb.

    Args:
        runs: knows this site's runs.
        downloads: what went wrong with the packages of runs that are not accepted yet.
        folder: on the disk whose free space counts.
    """

    async def why(asked: Asked) -> Body:
        number = parse_json(WhyBody, asked.body or b"{}", "why").run
        free = (await asyncio.to_thread(shutil.disk_usage, folder)).free
        mine = [
            {"run": run, "round": at, "phase": phase, "since_s": since}
            for run, at, phase, since, _ in runs.reports()
            if number in (0, run)
        ]
        held_up = bool(downloads.held_up) and not mine
        return {
            "runs": mine,
            "held_up": f"downloading the package, {downloads.held_up}" if held_up else "",
            "errors": downloads.lines if held_up else runs.troubles(number).lines,
            "disk_free_bytes": free,
        }

    return SiteVerb("why", "view", why, reaches=everyone)
