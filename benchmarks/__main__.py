"""`python -m benchmarks`: the echo rounds, printed as ratios; `QUICK=1` leaves out 1 GB."""

import os
import platform
import sys
import time
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.echo import measure

CASES = ((2, 1, 20), (2, 100, 6), (2, 1000, 3))


def main() -> int:
    """Measure each case and print the table."""
    cases = CASES[:2] if os.environ.get("QUICK") else CASES
    table = Table(box=None, header_style="bold")
    for column in ("sites", "MB", "rounds", "ours s/round", "bare TLS s/round", "ratio",
                   "submit→round 1 s", "server peak MB", "site peak MB"):  # fmt: skip
        table.add_column(column, justify="right")
    for sites, size_mb, rounds in cases:
        print(f"echo round: {sites} sites, {size_mb} MB, {rounds} rounds ...", file=sys.stderr)
        row = measure(sites, size_mb, rounds)
        table.add_row(
            str(row.sites), str(row.size_mb), str(row.rounds), f"{row.ours_s:.3f}",
            f"{row.limit_s:.3f}", f"{row.ratio:.2f}", f"{row.submit_to_task_s:.2f}",
            f"{row.server_peak_mb:.0f}", f"{row.site_peak_mb:.0f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    console.print(f"one fdatasync of 4 kB: {fdatasync_ms():.1f} ms; peaks count mapped models")
    console.print(
        f"Python {platform.python_version()}, grpcio {grpc.__version__}, "
        f"{os.cpu_count()} processors, {platform.machine()}"
    )
    return 0


def fdatasync_ms() -> float:
    """Return what one small durable write costs on this disk, in milliseconds."""
    path = Path("bench-sync.tmp")
    try:
        with path.open("wb") as file:
            begun = time.monotonic()
            for _ in range(20):
                file.write(b"x" * 4096)
                file.flush()
                os.fdatasync(file.fileno())
            return (time.monotonic() - begun) / 20 * 1000
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
