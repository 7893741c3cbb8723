"""`python -m benchmarks.growth`: how cost grows with sites, bytes and rounds, as tables."""

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import echo, idle
from benchmarks.targets import MB
from workspaces.running import Federation

IDLE = (100, 300, 1000)
SITES = (2, 4, 8, 16, 32)
SIZES_MB = (1, 10, 100)
ROUNDS = 300
WINDOW = 50


def main() -> None:
    """Measure and print."""
    by_idle_sites()
    by_sites()
    by_bytes()
    by_rounds()


def by_idle_sites() -> None:
    """Idle sites: what each of them costs the server."""
    _head("idle sites", "processor", "memory each", "registered after", "storm")
    for sites in IDLE:
        found = idle.measure(sites, 20.0)
        _row(
            sites, f"{found.core:.1%}", f"{found.bytes_each / 1000:.0f} kB",
            f"{found.register_s:.1f} s", f"{found.storm_s:.1f} s",
        )  # fmt: skip


def by_sites() -> None:
    """Rounds of 1 MB with more and more sites."""
    _head("sites, 1 MB", "round", "bare TLS", "server's own memory", "submit to round 1")
    for sites in SITES:
        _row(sites, *_cells(echo.measure(sites, MB, 8)))


def by_bytes() -> None:
    """Rounds of two sites with larger and larger models."""
    _head("MB, 2 sites", "round", "bare TLS", "server's own memory", "submit to round 1")
    for size in SIZES_MB:
        _row(size, *_cells(echo.measure(2, size * MB, 6)))


def _cells(found: echo.Echo) -> tuple[str, ...]:
    return (
        f"{found.ours_s:.3f} s", f"{found.limit_s:.3f} s",
        f"{found.server_own / MB:.0f} MB", f"{found.submit_s:.2f} s",
    )  # fmt: skip


def by_rounds() -> None:
    """One run of many rounds: does a late round cost more than an early one, and a restart?"""
    _head("rounds so far", "round", "log", "start of the server on it")
    with (
        tempfile.TemporaryDirectory(prefix="flbench-", ignore_cleanup_errors=True) as folder,
        Federation(Path(folder), {"site-1": {}, "site-2": {}}) as federation,
    ):
        for name in federation.sites:
            federation.local(name, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
        federation.start("server", *federation.sites)
        echo.write_job(federation, 2, MB // 10, ROUNDS)
        done = federation.console("submit_job echo --wait")
        if done.returncode:
            raise RuntimeError(f"the echo job failed:\n{done.stdout}\n{done.stderr}")
        steps = echo.steps_s(echo.events_of(federation))
        log = federation.kit("server") / "state" / "events.db"
        for end in range(WINDOW, ROUNDS, WINDOW):
            _row(end, f"{statistics.median(steps[end - WINDOW : end]):.3f} s", "", "")
        federation.stop()
        begun = time.monotonic()
        federation.start("server")
        taken = f"{time.monotonic() - begun:.2f} s"
        size = f"{log.stat().st_size / 1000:.0f} kB"
        _row(ROUNDS, f"{statistics.median(steps[-WINDOW:]):.3f} s", size, taken)


def _head(*cells: str) -> None:
    print()
    _row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
