import os

import pytest

from tests.support.federation import Federation, provision


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Shared by tests that only read it."""
    return provision(tmp_path_factory.mktemp("rpc"))


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut is the stores' test."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)
