import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.faults.tally import summary
from tests.strictness import pytest_make_collect_report, pytest_runtest_makereport
from tests.support.postgres import Cluster, running_cluster

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

# Terminals are forked; gRPC's handlers for that abort now and then while its threads are at work.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what the fault tests have done, if there were any."""
    if lines := summary(terminalreporter.stats):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A running PostgreSQL of this worker's own; a test that hurts it leaves it running."""
    yield from running_cluster()
