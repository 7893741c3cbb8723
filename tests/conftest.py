import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.postgres import Cluster, running_cluster

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("local", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A running PostgreSQL of this worker's own; a test that hurts it leaves it running."""
    yield from running_cluster()
