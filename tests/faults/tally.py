"""What a set of fault tests has done: counted in each test, summed up at the end."""

import json
from collections import Counter
from collections.abc import Iterable

PROPERTY = "faults"


class Tally:
    """Counts of one test, or of all."""

    def __init__(self) -> None:
        self.runs = 0
        self.recoveries = 0
        self.faults: Counter[str] = Counter()
        self.seeds: list[int] = []

    def fault(self, kind: str, count: int = 1) -> None:
        """Count an injected fault."""
        self.faults[kind] += count

    def recovered(self) -> None:
        """Count a process or a run that went on after a fault."""
        self.recoveries += 1

    def text(self) -> str:
        """Return what a worker tells the main process."""
        return json.dumps([self.runs, self.recoveries, self.faults, self.seeds])

    def add(self, text: str) -> None:
        """Add what a test has told."""
        runs, recoveries, faults, seeds = json.loads(text)
        self.runs += runs
        self.recoveries += recoveries
        self.faults.update(faults)
        self.seeds += seeds


def table(total: Tally, violations: int, skipped: Iterable[str]) -> list[str]:
    """Return the lines of the summary."""
    lines = [
        f"runs checked    {total.runs}",
        f"recoveries      {total.recoveries}",
        f"violations      {violations}",
        f"faults injected {sum(total.faults.values())}",
        *(f"    {count:>5}  {kind}" for kind, count in sorted(total.faults.items())),
    ]
    if total.seeds:
        lines.append(f"seeds           {' '.join(map(str, sorted(total.seeds)))}")
    skips = list(skipped)
    lines.append(f"skipped         {len(skips)}")
    return lines + [f"    {each}" for each in skips]
