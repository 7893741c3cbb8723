"""Tiny jobs at a tiny site, for tests that start real run processes."""

import contextlib
import shutil
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from flplatform.client import process_tree
from flplatform.client.executors import Outcome, RunProcess, RunSpec
from flplatform.core.job import ExecutorSpec
from flplatform.core.messages import Task, TaskFailure, TaskId
from flplatform.files.modelfile import save

ECHO = """
from flplatform.client.api import TrainResult, ValidateResult

def train(model, context):
    return TrainResult({name: array + 1 for name, array in model.items()}, 3)

def validate(model, context):
    return ValidateResult({"total": float(model["w"].sum())}, 2)
"""


class Site:
    """A kit with a secret, a dataset, and one run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kit = folder / "kit"
        self.key = self.kit / "startup" / "client.key"
        self.data = self.kit / "data"
        self.run = self.kit / "state" / "runs" / "run-7"
        self.code = self.run / "code"
        self.state = self.run / "state"
        self.log = self.kit / "logs" / "run-7.log"
        for path in (self.key.parent, self.data, self.code, self.log.parent):
            path.mkdir(parents=True)
        self.key.write_text("the site's key")
        (self.data / "table.csv").write_text("1,2,3")

    def spec(self, code: str = ECHO, *, script: bool = False, **changes: Any) -> RunSpec:
        (self.code / "job.py").write_text(textwrap.dedent(code))
        executor = ExecutorSpec(script="job.py") if script else ExecutorSpec(module="job")
        fields = {
            "run": 7,
            "site": "site-1",
            "folder": self.run / "process",
            "code": self.code,
            "kit": self.kit,
            "log": self.log,
            "state": self.state,
            "executor": executor,
            "data": {"table": self.data / "table.csv"},
        }
        return RunSpec(**fields | changes)

    def model(self, name: str = "model", **arrays: np.ndarray) -> Path:
        path = self.folder / f"{name}.safetensors"
        save(path, arrays or {"w": np.zeros(3, np.float32)})
        return path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    async def do(
        self, process: RunProcess, kind: str, model: Path | None, number: int = 1, seed: int = 5
    ) -> Outcome | TaskFailure:
        task = Task(TaskId(7, number, kind, "site-1"), seed)
        return await process.execute(task, model, self.work)

    def adopt(self, number: int) -> None:
        """Make the state of the last train task the committed one."""
        self.state.mkdir(exist_ok=True)
        shutil.move(self.work / "state", self.state / str(number))


@contextlib.asynccontextmanager
async def running(spec: RunSpec, **callbacks: Any) -> AsyncIterator[RunProcess]:
    """Start a run process; nothing of it is left afterwards."""
    process = RunProcess(spec, **callbacks)
    try:
        await process.start(30)
        yield process
    finally:
        await process.abort(1)
    assert left(process) == []


def left(process: RunProcess, patience_s: float = 0) -> list[int]:
    """Return what is still alive of a run process, once that is nothing or patience is over."""
    deadline = time.monotonic() + patience_s
    while True:
        found = [item.pid for item in process_tree.find(process.mark)]
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.02)
