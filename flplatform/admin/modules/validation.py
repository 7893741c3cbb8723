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
from flplatform.core.events import SourceModel
from flplatform.core.messages import GLOBAL_OWNER
from flplatform.hci import CommandSpec, Connection, argument

FEDERATED = ("best", "latest", "round")
"""Kinds of global models."""

SOME = 3
"""Gaps that are named where there is nothing else to show."""

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
        federated: owners of global models; all others are sites.
    """

    metric: str
    mode: str
    owners: tuple[str, ...]
    sites: tuple[str, ...]
    values: Mapping[tuple[str, str], float]
    federated: frozenset[str] = frozenset({GLOBAL_OWNER})

    @classmethod
    def of(cls, view: MatrixView, metric: str = "") -> "Matrix":
        """Pick a metric: the given one, the watched one, or the first by name.

        Raises:
            FailedPreconditionError: nobody reported it.
        """
        reported = metrics_of(view)
        metric = metric or view.metric or next(iter(reported), "")
        if metric not in reported:
            nothing = "there are no results" + ("" if view.complete else " yet")
            raise FailedPreconditionError(
                f"no site reported {metric!r}" if reported else nothing,
                hint=f"reported: {', '.join(reported)}" if reported else _some_gaps(view),
            )
        values = {key: cell[metric] for key, cell in view.cells.items() if metric in cell}
        mode = view.mode if metric == view.metric else ""
        federated = {owner for owner, model in view.models.items() if model.kind in FEDERATED}
        return cls(
            metric, mode, view.owners, view.sites, values, frozenset({GLOBAL_OWNER, *federated})
        )

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
            if owner not in self.federated and (worst := self.worst(owner, without=owner))
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
        run = self._control.run(number)
        if run.ended and not view.cells and not view.complete:
            raise FailedPreconditionError(
                f"run {number} {run.status} without a cross-validation",
                hint=f"validate all --run {number} measures its models",
            )
        matrix = Matrix.of(view, args.metric)
        names = {owner: label(owner, view) for owner in view.owners}
        again = tuple(run.run for run in self._control.runs() if run.source_run == number)
        if args.csv:
            await connection.text(_csv(matrix, view))
        else:
            columns, rows, marks = _table(matrix, names)
            await connection.table("cross validation", columns, rows, marks=marks, verbatim=True)
            await connection.text("\n".join(_notes(matrix, view, number, again)))
        await connection.data("cross_validation", _data(matrix, view, again))


def metrics_of(view: MatrixView) -> list[str]:
    """Return the names of all metrics that were reported."""
    return sorted({name for metrics in view.cells.values() for name in metrics})


def label(owner: str, view: MatrixView) -> str:
    """Return what a model's row is called: its owner and, unless that says it, which model."""
    model = view.models.get(owner)
    if model is None:
        return f"global (r{view.global_round}, best)" if owner == GLOBAL_OWNER else owner
    match model.kind:
        case "local" | "round":
            return owner
        case "update":
            return f"{owner} (update r{model.round})"
        case kind:
            return (
                f"{owner} (r{model.round}, {kind})"
                if kind != owner
                else f"{owner} (r{model.round})"
            )


def meaning(model: SourceModel) -> str:
    """Say which model of its owner this is."""
    match model.kind:
        case "local":
            return "best local model"
        case "update":
            return f"local model of round {model.round}'s update"
        case "round":
            return f"global model of round {model.round}"
        case kind:
            return f"{kind} global model, of round {model.round}"


def _some_gaps(view: MatrixView) -> str:
    said = [f"{owner} at {site}: {reason}" for (owner, site), reason in sorted(view.gaps.items())]
    more = f"; and {len(said) - SOME} more" if len(said) > SOME else ""
    return "; ".join(said[:SOME]) + more


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


def _notes(matrix: Matrix, view: MatrixView, run: int, again: Sequence[int]) -> Iterator[str]:
    if view.source_run:
        yield f"models of run {view.source_run}, validated again as run {run}"
    yield (
        f"{matrix.metric} ({matrix.mode} is best); * is the best at that site"
        if matrix.mode
        else matrix.metric
    )
    for (owner, site), reason in sorted(view.gaps.items()):
        if owner == "*":
            declined = reason.removeprefix("declined: ")
            who = f"{site} declined run {run}" if declined != reason else site
            lacks = "no column" if view.source_run else "no row and no column"
            yield f"{who}: {lacks} ({declined})"
        elif site == "*":
            yield f"{owner}: no row ({reason})"
        else:
            yield f"{owner} at {site}: {reason}"
    for owner in matrix.owners:
        if owner in view.models and view.models[owner].kind == "update":
            yield f"{owner}: {meaning(view.models[owner])}"
    if again:
        yield f"validated again as run {', '.join(map(str, again))}"
    if not view.complete:
        yield "the validation is not complete yet"
    if sentence := matrix.sentence():
        yield sentence


def _csv(matrix: Matrix, view: MatrixView) -> str:
    """Return one line per owner, also for those without a model; `gaps` says what is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_plain, ("owner", *matrix.sites, "worst", "gaps")))
    missing = sorted({owner for owner, _ in view.gaps} - {*matrix.owners, "*"})
    for owner in (*matrix.owners, *missing):
        worst = matrix.worst(owner)
        gaps = "; ".join(
            reason if site == "*" else f"{site}: {reason}"
            for (by, site), reason in sorted(view.gaps.items())
            if by in (owner, "*")
        )
        values = [*matrix.row(owner), worst[1] if worst else None]
        writer.writerow([_plain(label(owner, view)), *values, _plain(gaps)])
    return text.getvalue().removesuffix("\n")


def _plain(text: str) -> str:
    """Return text that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(FORMULA) else text


def _data(matrix: Matrix, view: MatrixView, again: Sequence[int]) -> dict[str, Any]:
    return {
        "metric": matrix.metric,
        "metrics": metrics_of(view),
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
        "models": models_as_json(view.models),
        "cells": [
            {"owner": owner, "site": site, "metrics": dict(metrics)}
            for (owner, site), metrics in sorted(view.cells.items())
        ],
        "source_run": view.source_run or None,
        "validations": list(again),
    }


def models_as_json(models: Mapping[str, SourceModel]) -> dict[str, Any]:
    """Return of each owner what its model is; digests are not told."""
    return {
        owner: {"kind": model.kind, "round": model.round} for owner, model in sorted(models.items())
    }
