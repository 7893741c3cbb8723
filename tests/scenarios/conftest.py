import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flplatform.core import events as ev
from workspaces.running import ADMIN, Federation

ROOT = Path(__file__).resolve().parents[2]

STEPS_CODE = '''
"""Adds noise drawn from the task's seed; waits while the test holds a file for this task."""
import time
import numpy as np
from flplatform.client.api import TrainResult, ValidateResult

def initial_model(args, seed):
    return {"w": np.zeros(int(args["floats"]), np.float32), "steps": np.zeros(1, np.int64)}

def hold(context, kind):
    gate = context.data["gate"]
    while (gate / f"{context.site}-{context.round}-{kind}").exists():
        time.sleep(0.01)

def train(model, context):
    hold(context, "train")
    if (context.data["gate"] / f"{context.site}-{context.round}-fail").exists():
        raise ValueError("the test asked for a failure")
    count = context.state_dir / "count"
    number = int(count.read_text()) if count.exists() else 0
    count.write_text(str(number + 1))
    noise = np.random.default_rng(context.seed + number).standard_normal(model["w"].size)
    w = model["w"] + noise.astype(np.float32)
    if (context.data["gate"] / f"{context.site}-{context.round}-nan").exists():
        w[0] = np.nan
    return TrainResult({"w": w, "steps": model["steps"] + 1}, len(context.site) + context.round)

def validate(model, context):
    hold(context, "validate")
    return ValidateResult({"size": float(np.abs(model["w"]).mean())}, 10)
'''

STEPS_JOB = """
name: steps
workflow: [scatter_gather, cross_site_validation]
rounds: {rounds}
min_clients: {min_clients}
wait_after_min_s: {wait_after_min_s}
round_deadline_s: {round_deadline_s}
on_deadline: {on_deadline}
data: [gate]
executor: {{module: steps}}
args: {{floats: {floats}}}
seed: 7
watch: {{metric: size, mode: min}}
initial_model: {{function: "steps:initial_model"}}
"""


class Running(Federation):
    """A running federation whose sites share one gate folder, and looks into its log."""

    def __init__(self, folder: Path, sites: tuple[str, ...], **limits: Any) -> None:
        self.gate = folder / "gate"
        self.gate.mkdir(parents=True)
        super().__init__(folder / "f", {site: {"gate": self.gate} for site in sites}, **limits)

    def steps_job(self, name: str = "steps", **settings: Any) -> str:
        """Put the steps job into the admin's transfer folder; return its name."""
        defaults = {
            "rounds": 2, "min_clients": len(self.sites), "wait_after_min_s": 5.0,
            "round_deadline_s": 600.0, "on_deadline": "extend", "floats": 1000,
        }  # fmt: skip
        job = self.kit(ADMIN) / "transfer" / name
        (job / "code").mkdir(parents=True)
        (job / "code" / "steps.py").write_text(STEPS_CODE)
        (job / "job.yml").write_text(STEPS_JOB.format(**{**defaults, **settings}))
        return name

    def copy_job(self, name: str) -> str:
        """Put an example job into the admin's transfer folder; return its name."""
        ignore = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(
            ROOT / "workspaces" / name, self.kit(ADMIN) / "transfer" / name, ignore=ignore
        )
        return name

    def hold(self, site: str, number: int, kind: str = "train") -> Callable[[], None]:
        """Hold a site's task; call the result to let it go."""
        path = self.gate / f"{site}-{number}-{kind}"
        path.touch()
        return path.unlink

    def events(self, run: int) -> list[ev.Event]:
        """Return the run's events as they are on disk."""
        path = self.kit("server") / "state" / "events.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT type, version, body FROM events WHERE stream=? ORDER BY seq",
                (f"run/{run}",),
            ).fetchall()
        return [ev.decode(*row, where=f"run/{run}") for row in rows]

    def wait_event(
        self, run: int, kind: type[ev.Event], deadline_s: float = 60, **fields: Any
    ) -> Any:
        """Return the first event of a kind with these fields, once it is on disk."""
        found: list[ev.Event] = []

        def there() -> bool:
            found[:] = [
                event
                for event in self.events(run)
                if isinstance(event, kind)
                and all(getattr(event, key) == value for key, value in fields.items())
            ]
            return bool(found)

        self.wait_for(there, f"{kind.__name__} {fields} of run {run}", deadline_s=deadline_s)
        return found[0]

    def final_digest(self, run: int) -> str:
        """Return the digest of the last published model."""
        published = [e for e in self.events(run) if isinstance(e, ev.ModelPublished)]
        return published[-1].model.digest


@pytest.fixture
def federation() -> Iterator[Callable[..., Running]]:
    """Make federations in short folders; all of them are stopped afterwards."""
    made: list[tuple[Running, Path]] = []

    def make(*sites: str, **limits: Any) -> Running:
        folder = Path(tempfile.mkdtemp(prefix="fls-"))
        running = Running(folder, sites or ("site-1", "site-2"), **limits)
        for site in running.sites:
            running.local(site, "policy.yml", "allow_foreign_code_unsandboxed: true\n")
        made.append((running, folder))
        return running

    yield make
    for running, folder in made:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
