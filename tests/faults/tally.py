"""What a set of fault tests has done: counted in each test, summed up at the end."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def summary(stats: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the summary of what pytest has reported; nothing if no fault test ran."""
    total, mine = Tally(), "tests/faults/"
    reports = [
        report
        for several in stats.values()
        for report in several
        if hasattr(report, "when") and report.nodeid.startswith(mine)  # not what was deselected
    ]
    for report in reports:
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    total.add(value)
    if not reports:
        return []
    violations = sum(report.failed for report in reports)
    skipped = [report for report in reports if report.skipped and not hasattr(report, "wasxfail")]
    known = {report.wasxfail for report in reports if hasattr(report, "wasxfail")}
    lines = table(total, violations, [_why(report) for report in skipped])
    return lines + [f"known           {len(known)}", *(f"    {each}" for each in sorted(known))]


def _why(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    return f"{report.nodeid.rpartition('::')[2]}: {str(reason).removeprefix('Skipped: ')}"
