import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

WORKSPACES = Path(__file__).parents[3] / "workspaces"


@dataclass
class FakeContext:
    """What a job sees of the platform, without a platform."""

    data: Mapping[str, Path]
    args: Mapping[str, Any]
    seed: int = 7
    run: int = 1
    round: int = 1
    site: str = "site-1"
    state_dir: Path = Path("unused")
    rank: int = 0
    world_size: int = 1
    logged: list[tuple[str, float]] = field(default_factory=list)

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        self.logged.append((name, value))


@pytest.fixture(scope="session")
def workspaces() -> Path:
    return WORKSPACES


@pytest.fixture
def heart_context() -> Callable[..., FakeContext]:
    def make(site: str = "cleveland", **changes: Any) -> FakeContext:
        args = {"learning_rate": 0.01, "local_updates": 100, "batch_size": 4}
        data = {"heart": WORKSPACES / "heart" / "data" / f"{site}.csv"}
        return FakeContext(**{"data": data, "args": args, "site": site} | changes)

    return make


@pytest.fixture
def job_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Imports a module of a job's code afresh: jobs have modules of the same name."""

    def load(job: str, module: str) -> ModuleType:
        code = WORKSPACES / job / "code"
        monkeypatch.syspath_prepend(str(code))
        for file in code.glob("*.py"):
            monkeypatch.delitem(sys.modules, file.stem, raising=False)
        return importlib.import_module(module)

    return load
