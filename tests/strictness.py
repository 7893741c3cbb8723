"""Where CI runs, a test that is left out has failed.

Only `@pytest.mark.may_skip` says that a test may skip there too; its reason goes into the summary.
"""

import os
from collections.abc import Iterator

import pytest

ON = bool(os.environ.get("CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a skip into a failure."""
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("may_skip")
    if ON and report.skipped and not expected:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be left out: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Turn the skip of a whole module into a failure."""
    report = yield
    if ON and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"left out, where nothing may be left out: {_reason(report)}"
    return report


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    longrepr = report.longrepr
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
