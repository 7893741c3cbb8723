"""Every model at every site: the matrix, its gaps, and what it says in one sentence."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin import units
from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run
from flplatform.core.control import MatrixView
from flplatform.core.errors import FailedPreconditionError
from flplatform.core.messages import GLOBAL_OWNER
from flplatform.hci import CommandSpec, Connection, argument

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would calculate."""


@dataclass(frozen=True)
class CrossVal:
    """Of `cross_val`."""

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
    csv: bool = argument(help="comma-separated values", option="--csv", default=False)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One metric of a cross-site validation.

    Attributes:
        metric: its name.
        mode: whether its `max` or `min` is best; empty if nobody said, and then nothing is.
        owners: model owners, `global` last.
        sites: data sites.
        values: (owner, site) -> value; gaps are absent.
    """

    metric: str
    mode: str
    owners: tuple[str, ...]
    sites: tuple[str, ...]
    values: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, view: MatrixView, metric: str = "") -> "Matrix":
        """Pick a metric: the given one, the watched one, or the first by name.

        Raises:
            FailedPreconditionError: nobody reported it.
        """
        reported = sorted({name for metrics in view.cells.values() for name in metrics})
        metric = metric or view.metric or next(iter(reported), "")
        if metric not in reported:
            raise FailedPreconditionError(
                f"no site reported {metric!r}" if reported else "there are no results yet",
                hint=f"reported: {', '.join(reported)}" if reported else "",
            )
        values = {key: cell[metric] for key, cell in view.cells.items() if metric in cell}
        mode = view.mode if metric == view.metric else ""
        return cls(metric, mode, view.owners, view.sites, values)

    def row(self, owner: str) -> list[float | None]:
        """Return a model's values, in the order of the sites."""
        return [self.values.get((owner, site)) for site in self.sites]

    def worst(self, owner: str, without: str = "") -> tuple[str, float] | None:
        """Return where a model does worst and how badly, leaving one site out."""
        found = {site: value for (by, site), value in self.values.items() if by == owner}
        found.pop(without, None)
        return self._worst_of(found)

    def best(self, site: str) -> float | None:
        """Return the best value at a site."""
        found = [value for (_, at), value in self.values.items() if at == site]
        return max(found, key=self._goodness) if found and self.mode else None

    def sentence(self) -> str:
        """Say how the global model's worst site compares with the worst of the local models."""
        places = {
            owner: worst
            for owner in self.owners
            if owner != GLOBAL_OWNER and (worst := self.worst(owner, without=owner))
        }
        own = self.worst(GLOBAL_OWNER)
        fallen = self._worst_of({owner: value for owner, (_, value) in places.items()})
        if fallen is None or own is None:
            return ""
        owner, value = fallen
        return (
            f"{owner}'s own model falls to {units.score(value)} at {places[owner][0]}; "
            f"the global model's worst is {units.score(own[1])}, at {own[0]}"
        )

    def _worst_of(self, values: Mapping[str, float]) -> tuple[str, float] | None:
        if not values or not self.mode:
            return None
        return min(sorted(values.items()), key=lambda item: self._goodness(item[1]))

    def _goodness(self, value: float) -> float:
        return value if self.mode == "max" else -value


class ValidationModule:
    """Cross-site validation.

    Args:
        control: knows the matrix.
    """

    name = "validation"
    summary = "models measured at other sites"

    def __init__(self, control: Control) -> None:
        self._control = control

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="cross_val",
                summary="shows how each site's model and the global one do at every site",
                arguments=CrossVal,
                handler=self._cross_val,
                permission="view",
                mutating=False,
                examples=("cross_val 3", "cross_val 3 --csv"),
                states="once the job's cross_site_validation has begun",
            )
        ]

    async def _cross_val(self, connection: Connection, args: CrossVal) -> None:
        number = current_run(self._control, args.run, ended=True)
        view = self._control.cross_validation(number)
        matrix = Matrix.of(view, args.metric)
        names = {GLOBAL_OWNER: f"global (r{view.global_round}, best)"}
        if args.csv:
            await connection.text(_csv(matrix, names))
        else:
            columns, rows, marks = _table(matrix, names)
            await connection.table("cross validation", columns, rows, marks=marks, verbatim=True)
            await connection.text("\n".join(_notes(matrix, view, number)))
        await connection.data("cross_validation", _data(matrix, view))


def _table(
    matrix: Matrix, names: Mapping[str, str]
) -> tuple[list[str], list[list[float | str | None]], dict[tuple[int, int], str]]:
    """Return columns, rows, and the marks: the best of each column, the worst of each row."""
    best = {site: matrix.best(site) for site in matrix.sites}
    rows: list[list[float | str | None]] = []
    marks: dict[tuple[int, int], str] = {}
    for number, owner in enumerate(matrix.owners):
        worst = matrix.worst(owner)
        for column, site in enumerate(matrix.sites, 1):
            value = matrix.values.get((owner, site))
            if worst is not None and site == worst[0]:
                marks[number, column] = "worst"
            if value is not None and value == best[site]:
                marks[number, column] = "best"
        rows.append([names.get(owner, owner), *matrix.row(owner), worst[1] if worst else None])
    return ["model owner \\ data", *matrix.sites, "worst"], rows, marks


def _notes(matrix: Matrix, view: MatrixView, run: int) -> Iterator[str]:
    yield (
        f"{matrix.metric} ({matrix.mode} is best); * is the best at that site"
        if matrix.mode
        else matrix.metric
    )
    for (owner, site), reason in sorted(view.gaps.items()):
        if owner == "*":
            declined = reason.removeprefix("declined: ")
            yield f"{site} declined run {run}: no row and no column ({declined})"
        elif site == "*":
            yield f"{owner}: no row ({reason})"
        else:
            yield f"{owner} at {site}: {reason}"
    if not view.complete:
        yield "the validation is not complete yet"
    if sentence := matrix.sentence():
        yield sentence


def _csv(matrix: Matrix, names: Mapping[str, str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_plain, ("owner", *matrix.sites, "worst")))
    for owner in matrix.owners:
        worst = matrix.worst(owner)
        writer.writerow(
            [_plain(names.get(owner, owner)), *matrix.row(owner), worst[1] if worst else None]
        )
    return text.getvalue().removesuffix("\n")


def _plain(text: str) -> str:
    """Return text that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(FORMULA) else text


def _data(matrix: Matrix, view: MatrixView) -> dict[str, Any]:
    return {
        "metric": matrix.metric,
        "mode": matrix.mode,
        "global_round": view.global_round,
        "complete": view.complete,
        "sites": matrix.sites,
        "owners": {
            owner: dict(zip(matrix.sites, matrix.row(owner), strict=True))
            for owner in matrix.owners
        },
        "gaps": [
            {"owner": owner, "site": site, "reason": reason}
            for (owner, site), reason in sorted(view.gaps.items())
        ],
        "sentence": matrix.sentence(),
    }
