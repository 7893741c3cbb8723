"""What a run leaves as files: its models, and tables and texts made from its log."""

import asyncio
import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence

from flplatform.core import events as ev
from flplatform.core.control import MatrixView, RoundMetrics
from flplatform.core.files_view import RunFile
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.server.runs import Runs
from flplatform.server.wording import describe

Cell = str | int | float | None


class FileTree:
    """Implements `core.files_view.FilesControl`. Lives on the event loop.

    Args:
        runs: knows the runs.
        metrics: returns what is known of each global model of a run.
        matrix: returns a run's cross-site validation.
    """

    def __init__(
        self,
        runs: Runs,
        metrics: Callable[[int], Sequence[RoundMetrics]],
        matrix: Callable[[int], MatrixView],
    ) -> None:
        self._runs = runs
        self._metrics = metrics
        self._matrix = matrix

    async def of_run(self, number: int) -> list[RunFile]:
        """Return all files of a run, in name order.

        Raises:
            NotFoundError: no such run.
            FLError: its log cannot be read.
        """
        actor = self._runs.view(number)
        state, events, times = actor.state, tuple(actor.events), tuple(actor.times)
        rounds, matrix = self._metrics(number), self._matrix(number)
        blobs = {
            "best.safetensors": state.best_model[1],
            "job.zip": state.opened.job_blob,
            **{f"models/round-{each}.safetensors": blob for each, blob in state.models.items()},
        }
        files = [RunFile(name, ModelRef(blob.digest, blob.size)) for name, blob in blobs.items()]
        files += await asyncio.to_thread(_made, events, times, rounds, matrix)
        return sorted(files, key=lambda file: file.name)


def _made(
    events: Sequence[ev.Event],
    times: Sequence[str],
    rounds: Sequence[RoundMetrics],
    matrix: MatrixView,
) -> list[RunFile]:
    texts = {
        "log.txt": "".join(
            f"{time} {' '.join(describe(event).split())}\n"
            for time, event in zip(times, events, strict=False)
        ),
        "metrics.csv": _csv(
            ("round", "site", "when", "metric", "value", "best"), _metric_rows(rounds)
        ),
    }
    if matrix.sites:
        names = ("model_owner", "data_site", "metric", "value", "gap")
        texts["cross_val.csv"] = _csv(names, _matrix_rows(matrix))
        texts["cross_val.json"] = json.dumps(_matrix_json(matrix), indent=1) + "\n"
    return [
        RunFile(name, ModelRef(digest_of(content), len(content)), content)
        for name, content in ((name, text.encode()) for name, text in texts.items())
    ]


def _metric_rows(rounds: Sequence[RoundMetrics]) -> Iterable[Sequence[Cell]]:
    """Yield a row per number; the score of all sites has no site."""
    for each in rounds:
        best = "best" if each.best else ""
        if each.score is not None:
            yield each.round, "", "global", "score", each.score, best
        for when, reports in (("global", each.sites), ("training", each.training)):
            for site, metrics in sorted(reports.items()):
                for name, value in sorted(metrics.items()):
                    yield each.round, site, when, name, value, best


def _matrix_rows(matrix: MatrixView) -> Iterable[Sequence[Cell]]:
    for owner in matrix.owners:
        for site in matrix.sites:
            for name, value in sorted(matrix.cells.get((owner, site), {}).items()):
                yield owner, site, name, value, ""
    for (owner, site), why in sorted(matrix.gaps.items()):
        yield owner, site, "", None, why


def _matrix_json(matrix: MatrixView) -> object:
    return {
        "owners": matrix.owners,
        "sites": matrix.sites,
        "metric": matrix.metric,
        "mode": matrix.mode,
        "global_round": matrix.global_round,
        "complete": matrix.complete,
        "cells": [
            {"model_owner": owner, "data_site": site, "metrics": dict(metrics)}
            for (owner, site), metrics in sorted(matrix.cells.items())
        ],
        "gaps": [
            {"model_owner": owner, "data_site": site, "reason": why}
            for (owner, site), why in sorted(matrix.gaps.items())
        ],
    }


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return text.getvalue()


def _harmless(cell: Cell) -> Cell:
    """Keep a spreadsheet from reading text as a formula; numbers stay numbers."""
    if isinstance(cell, str):
        cell = "".join(char if char.isprintable() else "?" for char in cell)
        return f"'{cell}" if cell[:1] in ("=", "+", "-", "@") and cell else cell
    return cell
