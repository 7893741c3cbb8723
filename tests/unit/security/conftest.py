import dataclasses
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flplatform.security.identity import TrustStore
from provisioning.authority import Authority, Issuer, create
from tests.support.federation import Federation, provision

FOUNDED = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)


@pytest.fixture(scope="session")
def rooted() -> tuple[Authority, Issuer]:
    return create("test", 3650, FOUNDED)


@pytest.fixture(scope="session")
def authority(rooted: tuple[Authority, Issuer]) -> Authority:
    return rooted[0]


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Shared by tests that only read it."""
    return provision(
        tmp_path_factory.mktemp("shared"),
        sites=("site-1", "site-2"),
        admins={"amy@x.org": "project_admin", "bob": "member@site-1"},
    )


@pytest.fixture(scope="session")
def trust(federation: Federation) -> TrustStore:
    return federation.open("server").trust


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("original"), sites=("site-1",), admins=("amy",))


@pytest.fixture
def own(original: Federation, tmp_path: Path) -> Federation:
    """A copy for tests that break it."""
    folder = shutil.copytree(original.folder, tmp_path / "federation" / "test")
    return dataclasses.replace(original, folder=folder)
