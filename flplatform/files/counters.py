"""Numbers of one process since its start: sums by name and key, and durations in buckets."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_KEYS = 500
"""Keys under one name; what comes beyond goes under `OTHERS`."""

OTHERS = "(others)"
SMALLEST_S = 1e-4
BUCKETS = 44
"""Bucket i holds durations up to SMALLEST_S x 2**(i/2); the last one those beyond 3 minutes."""

LOOK_S = 0.5


@dataclass(slots=True)
class Durations:
    """Durations by bucket: quantiles are off by the width of a bucket, 41 %, at most."""

    count: int = 0
    longest_s: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, seconds: float) -> None:
        """Take one."""
        index = 0
        if seconds > SMALLEST_S:
            index = min(BUCKETS - 1, math.ceil(2 * math.log2(seconds / SMALLEST_S)))
        self.buckets[index] += 1
        self.count += 1
        self.longest_s = max(self.longest_s, seconds)

    def quantile(self, share: float) -> float:
        """Return seconds that this share of the durations does not exceed; 0 if there are none."""
        wanted = math.ceil(share * self.count)
        seen = 0
        for index, count in enumerate(self.buckets):
            seen += count
            if count and seen >= wanted:
                bound = SMALLEST_S * 2 ** (index / 2) if index < BUCKETS - 1 else math.inf
                return min(self.longest_s, bound)
        return 0.0

    def view(self) -> dict[str, Any]:
        """Return count, median, 99th percentile and longest, in seconds."""
        return {
            "count": self.count,
            "p50_s": self.quantile(0.5),
            "p99_s": self.quantile(0.99),
            "max_s": self.longest_s,
        }


class Counters:
    """Sums and durations, each under a name and a key. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sums: dict[str, Counter[str]] = {}
        self._durations: dict[str, dict[str, Durations]] = {}

    def add(self, name: str, key: str = "", amount: int = 1) -> None:
        """Add to a sum."""
        sums = self._sums.setdefault(name, Counter())
        sums[key if key in sums or len(sums) < MAX_KEYS else OTHERS] += amount

    def took(self, name: str, key: str, seconds: float) -> None:
        """Note a duration."""
        found = self._durations.setdefault(name, {})
        key = key if key in found or len(found) < MAX_KEYS else OTHERS
        found.setdefault(key, Durations()).add(seconds)

    def sum(self, name: str) -> int:
        """Return a name's sum over all keys."""
        return self._sums.get(name, Counter()).total()

    def sums(self, name: str) -> dict[str, int]:
        """Return a name's sums by key."""
        return dict(self._sums.get(name, {}))

    def durations(self, name: str) -> dict[str, dict[str, Any]]:
        """Return a name's durations by key, see `Durations.view`."""
        return {key: each.view() for key, each in self._durations.get(name, {}).items()}


async def watch_loop(
    took: Callable[[str, str, float], None], name: str = "loop_lag", pause_s: float = LOOK_S
) -> None:
    """Measure for ever how late the event loop wakes up."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + pause_s
        await asyncio.sleep(pause_s)
        took(name, "", max(0.0, clock() - due))
