"""The same with a log in PostgreSQL."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError
from flplatform.server.upkeep import restore as restoring
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.log_id import OwnLog
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import open_store, snapshot
from tests.support.postgres import Cluster


def moved(place: Place, url: str) -> Place:
    """The same kit, with another state_url."""
    (place.kit.folder / "local" / "resources.yml").write_text(f'state_url: "{url}"\n')
    return Place.of(place.kit.folder)


def test_there_and_back(place: Place, postgres: Cluster, tmp_path: Path) -> None:
    with place.snapshot() as log:
        rows = {stream: log.read(stream) for stream in log.streams()}
    here = moved(place, postgres.url(postgres.new_schema()))
    with closing(open_store(here.target, OwnLog.of(here).id)) as store:
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


def test_a_restore_that_did_not_end(
    place: Place, postgres: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same backup ends it, whether its events were in the database already or not."""
    back_up(place, tmp_path / "one")
    with closing(open_store(place.target)) as store:
        last = store.read(ev.FEDERATION)[-1]
        event = ev.encode(ev.RunDeleted(run=1, by="lead"))
        store.append([type(last)(last.stream, last.seq + 1, last.time, *event)]).result()
    back_up(place, tmp_path / "two")
    shutil.rmtree(place.folder)
    here = moved(place, postgres.url(postgres.new_schema()))

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_fill_log", "_demand_restored"):
        with monkeypatch.context() as patched:
            patched.setattr(restoring, step, cut)
            with pytest.raises(KeyboardInterrupt):
                restore(tmp_path / "one", here)
        assert any("did not end" in each.text for each in verify_state(here).problems)
    with pytest.raises(FailedPreconditionError, match="does not hold the events of"):
        restore(tmp_path / "two", here)
    restore(tmp_path / "one", here)
    assert not verify_state(here, deep=True).problems


def test_a_log_with_a_gap(place: Place, postgres: Cluster, tmp_path: Path) -> None:
    back_up(place, tmp_path / "one")
    shutil.rmtree(place.folder)
    schema = postgres.new_schema()
    here = moved(place, postgres.url(schema))
    restore(tmp_path / "one", here)
    postgres.execute("DELETE FROM events WHERE stream='run/1' AND seq=4", schema=schema)
    with here.snapshot() as log:
        rows, origin = log.read("run/1"), log.origin
    made = back_up(here, tmp_path / "two", damaged=True)
    assert any("I1 gapless stream: event 4 is missing" in each for each in made.problems)
    with snapshot(tmp_path / "two" / "events.db") as copied:
        assert (copied.read("run/1"), copied.origin) == (rows, origin)
    assert not [*(tmp_path / "two").glob("events.db?*")]
