"""Per-step metrics that training code logs: a bounded file per run, not events."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError
from flplatform.core.messages import check_metrics

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 << 20
MAX_BODY_BYTES = 64 << 10


METRICS = "metrics"
"""Folder of the files, in the server's state."""


def metric_file(folder: Path, run: int) -> Path:
    """Return the file with a run's points."""
    return folder / f"run-{run}.jsonl"


class MetricLog:
    """Takes results of topic `metrics`: `{run, round, name, value, step}` each.

    Args:
        folder: where the files are.
        takes_part: (site, run) → whether the site may speak of the run.
    """

    topic = "metrics"

    def __init__(self, folder: Path, takes_part: Callable[[str, int], bool]) -> None:
        self._takes_part = takes_part
        self._folder = folder
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._dropped: Counter[int] = Counter()

    def process(self, site: str, body: bytes) -> None:
        """Append one point; beyond the file's limit points are counted and dropped.

        Raises:
            InvalidArgumentError: malformed.
            PermissionDeniedError: the site has no part in the run.
        """
        try:
            point: Any = json.loads(body) if len(body) <= MAX_BODY_BYTES else None
            run, number, step = int(point["run"]), int(point["round"]), int(point.get("step") or 0)
            values = check_metrics({str(point["name"]): float(point["value"])})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise InvalidArgumentError("is not a metric point", field="body") from None
        if not self._takes_part(site, run):
            raise PermissionDeniedError(f"{site} has no part in run {run}", rule="own_runs_only")
        path = metric_file(self._folder, run)
        if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
            self._dropped[run] += 1
            if self._dropped[run] == 1:
                log.warning("run %d: %s is full, further points are dropped", run, path.name)
            return
        (name, value), *_ = values.items()
        entry = {"site": site, "round": number, "step": step, "name": name, "value": value}
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
