"""`python -m benchmarks`: this machine's limits beside ours, held against the targets.

`QUICK=1` leaves out 1 GB; `STRICT=1` ends non-zero if a target is missed; `JSON=FILE` takes all
that was measured (default `bench.json`).
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import echo, idle, uploads
from benchmarks.targets import MB, Row, rows_of_echo, rows_of_idle, rows_of_start, rows_of_uploads
from flplatform import __version__

CASES = ((2, 1, 20), (32, 1, 6), (2, 100, 6), (8, 100, 4), (2, 1000, 3))
IDLE_SITES = 1000
WATCH_S = 20.0


def measure(quick: bool) -> Iterator[Row]:
    """Measure case by case."""
    sync_s = fdatasync_s()
    for sites, size_mb, rounds in CASES[:-1] if quick else CASES:
        _say(f"echo round: {sites} sites, {size_mb} MB, {rounds} rounds")
        case = echo.measure(sites, size_mb * MB, rounds)
        yield from rows_of_echo(case, sync_s)
        if (sites, size_mb, rounds) == CASES[0]:
            yield from rows_of_start(case)
    _say("control beside 8 uploads of 100 MB")
    yield from rows_of_uploads(uploads.measure(8, 100 * MB))
    _say(f"{IDLE_SITES} idle sites")
    yield from rows_of_idle(idle.measure(IDLE_SITES, WATCH_S))


def _say(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def show(rows: Sequence[Row]) -> Table:
    """Return the rows as a table."""
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for column in ("target", "ours", "limit", "ratio", "met"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            row.target,
            f"{row.ours:.3g} {row.unit}",
            "" if row.limit is None else f"{row.limit:.3g} {row.unit}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "yes" if row.met else "NO",
        )
    return table


def versions() -> dict[str, object]:
    """Return what was measured with, and on."""
    return {
        "flplatform": __version__,
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "numpy": np.__version__,
        "processors": os.cpu_count(),
        "machine": platform.machine(),
    }


def fdatasync_s() -> float:
    """Return what one small durable write costs on the disk of temporary files, in seconds."""
    with tempfile.NamedTemporaryFile() as file:
        begun = time.monotonic()
        for _ in range(20):
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
        return (time.monotonic() - begun) / 20


def main() -> int:
    """Measure, print, write the JSON file; return 1 if a target is missed and that matters."""
    rows = list(measure(bool(os.environ.get("QUICK"))))
    console = Console(width=120)
    console.print(show(rows))
    console.print(", ".join(f"{name} {value}" for name, value in versions().items()))
    document = {
        "versions": versions(),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    path = Path(os.environ.get("JSON") or "bench.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    missed = [row.what for row in rows if not row.met]
    if missed:
        console.print(f"missed: {'; '.join(missed)}")
    return 1 if missed and os.environ.get("STRICT") else 0


if __name__ == "__main__":
    sys.exit(main())
