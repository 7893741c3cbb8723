"""Many sites that all come back at once after the server was killed."""

import pytest

from benchmarks import idle

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(300)]

SITES = 300
STORM_S = 60.0
CONSOLE_S = 10.0
BYTES_EACH = 1_000_000
"""Bounds for a machine that others use as well; docs/scaling.md has what was measured."""


def test_hundreds_of_sites_come_back_at_once(tally):
    found = idle.measure(SITES, 2.0)
    tally.fault("SIGKILL of a server with hundreds of sites")
    tally.recovered()
    assert found.storm_s < STORM_S, found
    assert found.console_s < CONSOLE_S, found
    assert found.bytes_each < BYTES_EACH, found
