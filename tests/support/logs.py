"""Logs and numbers of a server that is not there."""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flplatform.core.logs import Failure, LogLine, LogNews


@dataclass
class FakeFeed:
    """Implements `core.logs.LogFeed`; brings one piece of news after another.

    Attributes:
        script: the news, or what is called for its own sake or to return news; after the last
            one nothing comes any more.
    """

    id: str = "5" * 32
    script: deque[Any] = field(default_factory=deque)
    closed: bool = False

    async def news(self, timeout_s: float) -> LogNews:
        if not self.script:
            await asyncio.Event().wait()
        step = self.script.popleft()
        news = step() if callable(step) else step
        return news if isinstance(news, LogNews) else LogNews()

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLogs:
    """Implements `core.logs.LogsControl`."""

    lines: list[LogLine] = field(default_factory=list)
    cause: Failure | None = None
    feed: FakeFeed = field(default_factory=FakeFeed)
    followed: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    def of_run(self, run: int) -> list[LogLine]:
        return self.lines

    def failure(self, run: int) -> Failure | None:
        return self.cause

    def follow(self, run: int, sites: Sequence[str]) -> FakeFeed:
        self.followed.append((run, tuple(sites)))
        return self.feed


@dataclass
class FakeStats:
    """Implements `core.stats.StatsControl`."""

    found: dict[str, Any] = field(default_factory=lambda: {"since": 1e9, "counts": [], "last": []})
    numbers: dict[str, Any] = field(
        default_factory=lambda: {
            "uptime_s": 60.0,
            "runs_active": 1,
            "rpcs": {"GetTask ok": {"count": 3, "p50_s": 0.5, "p99_s": 60.0, "max_s": 60.0}},
            "received_bytes": {"a": 1000},
            "sent_bytes": {"a": 2000, "b": 5},
            "requests": 7,
            "requests_outstanding": 1,
            "appends": 12,
            "loop_lag": {"count": 9, "p50_s": 0.001, "p99_s": 0.002, "max_s": 0.01},
        }
    )

    def errors(self) -> Mapping[str, Any]:
        return self.found

    def reset_errors(self) -> int:
        count = sum(entry[2] for entry in self.found["counts"])
        self.found = {"since": 1e9, "counts": [], "last": []}
        return count

    def stats(self) -> Mapping[str, Any]:
        return self.numbers
