import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.federations import Faulty
from tests.faults.tally import PROPERTY, Tally

LONG = os.environ.get("FAULTS") == "long"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test here, and leave to the long set what belongs there."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.faults)
    later = [item for item in items if item.get_closest_marker("faults_long")]
    if later and not LONG:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Count what this test does to others."""
    counts = Tally()
    yield counts
    request.node.user_properties.append((PROPERTY, counts.text()))


@pytest.fixture
def faulty(tally: Tally) -> Iterator[Callable[..., Faulty]]:
    """Make federations in short folders; all of them are stopped afterwards."""
    made: list[tuple[Faulty, Path]] = []

    def make(*sites: str, **limits) -> Faulty:
        folder = Path(tempfile.mkdtemp(prefix="flf-"))
        made.append((Faulty(folder, sites or ("site-1", "site-2"), tally, **limits), folder))
        return made[-1][0]

    yield make
    for federation, folder in made:
        federation.stop()
        shutil.rmtree(folder, ignore_errors=True)
