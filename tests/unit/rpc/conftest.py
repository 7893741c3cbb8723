import pytest

from tests.support.federation import Federation, provision


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Shared by tests that only read it."""
    return provision(tmp_path_factory.mktemp("rpc"))
