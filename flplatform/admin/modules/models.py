"""What a run has learnt: the rounds' scores, and the models themselves."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin import views
from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run
from flplatform.admin.transfers import Transfers
from flplatform.core.control import RoundMetrics
from flplatform.hci import CommandSpec, Connection, argument

_WHICH = re.compile(r"best|last|[0-9]{1,9}")


@dataclass(frozen=True)
class ShowMetrics:
    """Of `show_metrics`."""

    run: int | None = argument(
        help="the run's number; default the current or the latest one",
        complete="run",
        minimum=1,
        default=None,
    )
    metric: str = argument(
        help="the metric; default the one that the job watches",
        option="--metric",
        metavar="NAME",
        default="",
    )
    per_site: bool = argument(help="plot each site's curve", option="--per-site", default=False)


@dataclass(frozen=True)
class DownloadModel:
    """Of `download_model`."""

    run: int | None = argument(
        help="the run's number; default the current or the latest one",
        complete="run",
        minimum=1,
        default=None,
    )
    which: str = argument(help="a round, best or last", metavar="ROUND|best|last", default="best")
    to: str = argument(
        help="the file to make; default in the kit's transfer folder",
        option="--to",
        complete="path",
        metavar="FILE",
        default="",
    )

    def __post_init__(self) -> None:
        if not _WHICH.fullmatch(self.which):
            raise ValueError(f"{self.which!r} is not a round's number, best or last")


class ModelsModule:
    """Scores and models of runs.

    Args:
        control: knows them.
        transfers: grants downloads.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, transfers: Transfers) -> None:
        self._control = control
        self._transfers = transfers

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="show_metrics",
                summary="shows how good each round's global model is, as table and plot",
                arguments=ShowMetrics,
                handler=self._show_metrics,
                permission="view",
                mutating=False,
                examples=("show_metrics 3", "show_metrics 3 --metric loss --per-site"),
            ),
            CommandSpec(
                name="download_model",
                summary="downloads a global model as a safetensors file",
                arguments=DownloadModel,
                handler=self._download_model,
                permission="files",
                mutating=False,
                examples=("download_model 3", "download_model 3 last --to model.safetensors"),
                local="download_model",
            ),
        ]

    async def _show_metrics(self, connection: Connection, args: ShowMetrics) -> None:
        run = self._control.run(current_run(self._control, args.run, ended=True))
        rounds = self._control.metrics(run.run)
        metric = args.metric or run.metric or _first_metric(rounds)
        sites = sorted({site for each in rounds for site in (*each.sites, *each.training)})
        watched = bool(metric) and metric == run.metric
        late = any(each.stragglers for each in rounds)
        rows = [
            (
                each.round,
                *([each.score] if watched else []),
                *(_value(each, site, metric) for site in sites),
                *([each.closed or None, ", ".join(each.stragglers) or None] if late else []),
            )
            for each in rounds
        ]
        await connection.text(f"run {run.run} ({run.name}): {metric or 'no metric was reported'}")
        columns = ["round", *["score"] * watched, *sites, *["closed", "without"] * late]
        marks = {(row, 1): "best" for row, each in enumerate(rounds) if each.best and watched}
        await connection.table("rounds", columns, rows, marks=marks, verbatim=True)
        trained = [each for each in rounds if each.round > 0]
        curves = {"all sites": [_or_nan(each.score) for each in trained]} if watched else {}
        if args.per_site or not watched:
            curves |= {
                site: [_or_nan(_value(each, site, metric)) for each in trained] for site in sites
            }
        if trained and metric:
            await connection.plot(metric, "round", curves)
        await connection.data("metric", metric)
        await connection.data("rounds", [views.of_round(each) for each in rounds])

    async def _download_model(self, connection: Connection, args: DownloadModel) -> None:
        which = int(args.which) if args.which.isdecimal() else args.which
        run = current_run(self._control, args.run, ended=True)
        number, blob = self._control.model(run, which)
        self._transfers.grant(connection.session, blob.digest)
        model: dict[str, int | str] = {
            "run": run,
            "round": number,
            "digest": blob.digest,
            "size": blob.size,
        }
        await connection.data("model", model)


def _first_metric(rounds: Sequence[RoundMetrics]) -> str:
    for reports in ([each.sites for each in rounds], [each.training for each in rounds]):
        names = {name for by_site in reports for metrics in by_site.values() for name in metrics}
        if names:
            return min(names)
    return ""


def _value(each: RoundMetrics, site: str, metric: str) -> float | None:
    """Return what the site measured of this model, or else reported while training it."""
    for reports in (each.sites, each.training):
        value = reports.get(site, {}).get(metric)
        if value is not None:
            return value
    return None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
