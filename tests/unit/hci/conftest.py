"""What the tests of the console framework share."""

import pytest

from flplatform.hci.sessions import AdminSession


@pytest.fixture
def session() -> AdminSession:
    return AdminSession(
        id="abc123",
        user="amy@clinic-a.org",
        role="lead",
        organisation="clinic-a",
        peer="10.0.0.1:5000",
        fingerprint="f0",
        created=0.0,
        last_used=0.0,
    )
