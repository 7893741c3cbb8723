"""The same with a log in PostgreSQL."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core.errors import FailedPreconditionError
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import snapshot
from flplatform.store.state import SqlStateStore
from tests.support.postgres import Cluster


def moved(place: Place, url: str) -> Place:
    """The same kit, with another state_url."""
    (place.kit.folder / "local" / "resources.yml").write_text(f'state_url: "{url}"\n')
    return Place.of(place.kit.folder)


def test_there_and_back(place: Place, postgres: Cluster, tmp_path: Path) -> None:
    with place.snapshot() as log:
        rows = {stream: log.read(stream) for stream in log.streams()}
    here = moved(place, postgres.url(postgres.new_schema()))
    with closing(SqlStateStore(here.target, lambda _error: None)) as store:
        for stream in rows.values():
            store.append(stream).result()
        assert not verify_state(here, deep=True).problems  # beside the writer
        back_up(here, tmp_path / "backup")
    assert [each.outcome for each in replay_run(here, 1)] == ["same"] * 3
    with pytest.raises(FailedPreconditionError, match="holds the events of 3 streams"):
        restore(tmp_path / "backup", here, move_aside=True)
    shutil.rmtree(here.folder)
    there = moved(place, postgres.url(postgres.new_schema()))
    restore(tmp_path / "backup", there)
    assert not verify_state(there, deep=True).problems
    with snapshot(there.target) as log:
        assert {stream: log.read(stream) for stream in log.streams()} == rows
