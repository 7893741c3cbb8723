"""The echo round: real processes through the real task loop; sites return what they received."""

import shutil
import sqlite3
import statistics
import tempfile
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks import bare_tls
from workspaces.running import ADMIN, Federation

ECHO = Path(__file__).resolve().parent.parent / "workspaces" / "echo"


@dataclass(frozen=True)
class Echo:
    """One row of the table; seconds are medians over the rounds after the first."""

    sites: int
    size_mb: int
    rounds: int
    ours_s: float
    limit_s: float
    submit_to_task_s: float
    server_peak_mb: float
    site_peak_mb: float

    @property
    def ratio(self) -> float:
        """Ours in units of the limit."""
        return self.ours_s / self.limit_s


def measure(sites: int, size_mb: int, rounds: int) -> Echo:
    """Run an echo job of `rounds` rounds and the bare-TLS baseline after it."""
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    with tempfile.TemporaryDirectory(prefix="flbench-", ignore_cleanup_errors=True) as folder:
        with Federation(Path(folder), {name: {} for name in names}) as federation:
            for name in names:
                federation.local(name, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
            federation.start_all()
            _write_job(federation, sites, size_mb, rounds)
            done = federation.console("submit_job echo --wait")
            if done.returncode:
                raise RuntimeError(f"the echo job failed:\n{done.stdout}\n{done.stderr}")
            peaks = {
                name: _peak_mb(federation.processes[name].pid) for name in ("server", names[0])
            }
            events = _events(federation)
        limit = bare_tls.measure(federation.folder / "kits", names, size_mb * 1_000_000, 4)
    published = [time for kind, time in events if kind == "ModelPublished"]
    opened = [time for kind, time in events if kind == "RoundOpened"]
    steps = [(b - a).total_seconds() for a, b in zip(published, published[1:], strict=False)]
    return Echo(
        sites=sites,
        size_mb=size_mb,
        rounds=rounds,
        ours_s=statistics.median(steps),
        limit_s=limit,
        submit_to_task_s=(opened[0] - events[0][1]).total_seconds(),
        server_peak_mb=peaks["server"],
        site_peak_mb=peaks[names[0]],
    )


def _write_job(federation: Federation, sites: int, size_mb: int, rounds: int) -> None:
    job = federation.kit(ADMIN) / "transfer" / "echo"
    shutil.copytree(ECHO, job, ignore=shutil.ignore_patterns("__pycache__"))
    spec = yaml.safe_load((job / "job.yml").read_text())
    spec |= {"rounds": rounds, "min_clients": sites, "args": {"size_mb": size_mb}}
    (job / "job.yml").write_text(yaml.safe_dump(spec))


def _events(federation: Federation) -> list[tuple[str, datetime]]:
    path = federation.kit("server") / "state" / "events.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT type, time FROM events WHERE stream='run/1' ORDER BY seq")
        return [(kind, datetime.fromisoformat(time)) for kind, time in rows]


def _peak_mb(pid: int) -> float:
    """Return the peak of a process's resident memory, mapped model files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return 0.0
