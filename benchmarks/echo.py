"""The echo round: real processes through the real task loop; sites return what they received."""

import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import yaml

from benchmarks import bare_tls
from workspaces.running import ADMIN, Federation

LOOK_S = 0.05
ECHO = Path(__file__).resolve().parent.parent / "workspaces" / "echo"


@dataclass(frozen=True)
class Echo:
    """One case; seconds are medians over the rounds after the first, memory is in bytes.

    Attributes:
        ours_s, limit_s: a round, on the platform and between bare TLS sockets.
        submit_s: from the run's number to its first round.
        interpreters_s: as many interpreters as there are sites, started at once, import numpy:
            each site starts one for the run.
        start_s: of server, site and console, from exec to readiness.
        server_own, site_own: peaks of anonymous memory: without mapped files.
        server_resident: peak of all memory, mapped files included.
    """

    sites: int
    size: int
    rounds: int
    ours_s: float
    limit_s: float
    submit_s: float
    interpreters_s: float
    start_s: Mapping[str, float]
    server_own: int
    site_own: int
    server_resident: int

    @property
    def ratio(self) -> float:
        """Ours in units of the limit."""
        return self.ours_s / self.limit_s


def measure(sites: int, size: int, rounds: int) -> Echo:
    """Run an echo job of `rounds` rounds with models of `size` bytes, and then the baseline."""
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    with tempfile.TemporaryDirectory(prefix="flbench-", ignore_cleanup_errors=True) as folder:
        with Federation(Path(folder), {name: {} for name in names}) as federation:
            for name in names:
                federation.local(name, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
            start_s = {
                "server": _timed(lambda: federation.start("server")),
                "site": _timed(lambda: federation.start(names[0])),
                "console": _timed(lambda: federation.console("bye")),
            }
            federation.start(*names[1:])
            write_job(federation, sites, size, rounds)
            with Watch(federation, ("server", names[0])) as watch:
                done = federation.console("submit_job echo --wait")
            if done.returncode:
                raise RuntimeError(f"the echo job failed:\n{done.stdout}\n{done.stderr}")
            resident = _peak_resident(federation.processes["server"].pid)
            events = events_of(federation)
        limit = bare_tls.measure(federation.folder / "kits", names, size, 4)
    opened = [time for kind, time in events if kind == "RoundOpened"]
    steps = steps_s(events)
    return Echo(
        sites=sites,
        size=size,
        rounds=rounds,
        ours_s=statistics.median(steps),
        limit_s=limit,
        submit_s=(opened[0] - events[0][1]).total_seconds(),
        interpreters_s=_timed(lambda: start_interpreters(sites)),
        start_s=start_s,
        server_own=watch.peaks["server"],
        site_own=watch.peaks[names[0]],
        server_resident=resident,
    )


def start_interpreters(count: int) -> None:
    """Start so many interpreters at once, as sites do for a run, and wait for them all."""
    command = [sys.executable, "-P", "-c", "import numpy"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    for process in processes:
        if process.wait():
            raise RuntimeError("an interpreter does not start")


def steps_s(events: Sequence[tuple[str, datetime]]) -> list[float]:
    """Return what each round after the first took, in seconds."""
    published = [time for kind, time in events if kind == "ModelPublished"]
    return [(b - a).total_seconds() for a, b in zip(published, published[1:], strict=False)]


def _timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


class Watch:
    """Looks at the anonymous memory of processes, again and again, while in the block."""

    def __init__(self, federation: Federation, names: Sequence[str]) -> None:
        self._pids = {name: federation.processes[name].pid for name in names}
        self.peaks = dict.fromkeys(names, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            for name, pid in self._pids.items():
                self.peaks[name] = max(self.peaks[name], _anonymous(pid))


def _anonymous(pid: int) -> int:
    """Return a process's memory that is no file's, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


def write_job(federation: Federation, sites: int, size: int, rounds: int) -> None:
    job = federation.kit(ADMIN) / "transfer" / "echo"
    shutil.copytree(ECHO, job, ignore=shutil.ignore_patterns("__pycache__"))
    spec = yaml.safe_load((job / "job.yml").read_text())
    spec |= {"rounds": rounds, "min_clients": sites, "args": {"size_mb": size / 1e6}}
    (job / "job.yml").write_text(yaml.safe_dump(spec))


def events_of(federation: Federation) -> list[tuple[str, datetime]]:
    """Return kind and time of the first run's events."""
    path = federation.kit("server") / "state" / "events.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT type, time FROM events WHERE stream='run/1' ORDER BY seq")
        return [(kind, datetime.fromisoformat(time)) for kind, time in rows]


def _peak_resident(pid: int) -> int:
    """Return the peak of a process's resident memory, mapped model files included, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
