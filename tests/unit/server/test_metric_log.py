import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flplatform.core.errors import InvalidArgumentError, PermissionDeniedError
from flplatform.server import metric_log
from flplatform.server.metric_log import MetricLog

POINT = {"run": 1, "round": 2, "name": "loss", "value": 0.5, "step": 3}


@pytest.fixture
def metrics(tmp_path: Path) -> MetricLog:
    return MetricLog(tmp_path / "metrics", lambda site, run: (site, run) == ("a", 1))


def body(**changes: Any) -> bytes:
    return json.dumps({**POINT, **changes}).encode()


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics" / "run-1.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_points_are_kept_in_order(metrics: MetricLog, tmp_path: Path) -> None:
    metrics.process("a", body())
    metrics.process("a", body(step=None, value=1))
    assert lines(tmp_path) == [
        {"site": "a", "round": 2, "step": 3, "name": "loss", "value": 0.5},
        {"site": "a", "round": 2, "step": 0, "name": "loss", "value": 1.0},
    ]


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff",
        b"[" * 60_000,
        body(run="x"),
        body(run=None),
        b'{"run": Infinity, "round": 1, "name": "x", "value": 1}',
        b'{"run": 1, "round": NaN, "name": "x", "value": 1}',
        body(value=float("nan")),
        body(value="Infinity"),
        body(value=None),
        body(name=""),
        body(name="x" * 101),
        body(name="a\nb"),
        body(name="x" * metric_log.MAX_BODY_BYTES),
        json.dumps({"run": 1}).encode(),
    ],
)
def test_odd_points_are_refused(metrics: MetricLog, tmp_path: Path, odd: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        metrics.process("a", odd)
    assert lines(tmp_path) == []


@pytest.mark.parametrize(("site", "run"), [("b", 1), ("a", 2), ("a", -1), ("a", 10**30)])
def test_a_site_speaks_of_its_own_runs_alone(
    metrics: MetricLog, tmp_path: Path, site: str, run: int
) -> None:
    """Else it could fill the disk, one file per number."""
    with pytest.raises(PermissionDeniedError):
        metrics.process(site, body(run=run))
    assert list((tmp_path / "metrics").iterdir()) == []


def test_a_file_has_a_limit(
    metrics: MetricLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(metric_log, "MAX_FILE_BYTES", 200)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            metrics.process("a", body())
    assert 1 < len(lines(tmp_path)) < 6
    assert len(caplog.records) == 1, "said once"
