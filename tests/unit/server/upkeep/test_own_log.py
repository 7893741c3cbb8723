"""A server works on the log of its state folder, and on no other: the models would be lost."""

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core.errors import ConfigError, DataLossError
from flplatform.server.server import FederatedServer
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.log_id import LOG_ID, OwnLog
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.unfinished import Unfinished
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import open_store, snapshot
from tests.support.postgres import OWNER, Cluster, binaries
from tests.unit.server.scene import play


def start(kit: Path) -> None:
    """Make a server, as one that starts, and stop it before it serves."""

    async def it() -> None:
        await FederatedServer(Place.of(kit).kit, lambda _restart: None).stop()

    play(it())


def keep_log_in(kit: Path, url: str) -> Place:
    (kit / "local" / "resources.yml").write_text(f'reserve_bytes: 0\nstate_url: "{url}"\n')
    return Place.of(kit)


def noted_in(place: Place) -> Path:
    """Where the kit notes to which log its state belongs."""
    return place.kit.folder / LOG_ID


def write_private(path: Path, text: str) -> None:
    path.touch(0o600)
    path.write_text(f"{text}\n")


def origin_of(place: Place) -> str:
    with place.snapshot() as log:
        return log.origin


@pytest.fixture
def started(kit: Path) -> Place:
    """A state on which a server has run since logs have ids."""
    (kit / "local" / "resources.yml").write_text("reserve_bytes: 0\n")
    start(kit)
    return Place.of(kit)


def test_the_first_start_ties_them(started: Place) -> None:
    text = (started.folder / LOG_ID).read_text()
    assert re.fullmatch("[0-9a-f]{32}\n", text)
    assert text.strip() == origin_of(started) == OwnLog.of(started).id
    assert (started.folder / LOG_ID).stat().st_mode & 0o777 == 0o600
    start(started.kit.folder)
    assert (started.folder / LOG_ID).read_text() == text
    assert not verify_state(started).problems


def spoil_by_loss(place: Place) -> None:
    for path in place.folder.glob("events.db*"):
        path.unlink()


def spoil_by_url(place: Place) -> None:
    keep_log_in(place.kit.folder, f"sqlite:///{place.kit.folder.parent}/new.db")


def spoil_by_another(place: Place) -> None:
    """Another server's, which holds events."""
    path = place.kit.folder.parent / "another.db"
    with place.snapshot() as log, closing(open_store(path)) as store:
        for stream in log.streams():
            store.append(log.read(stream)).result()
    keep_log_in(place.kit.folder, f"sqlite:///{path}")


@pytest.mark.parametrize("spoil", [spoil_by_loss, spoil_by_url, spoil_by_another])
def test_another_log_is_refused(started: Place, spoil: Callable[[Place], None]) -> None:
    blobs, known = started.blobs.digests(), OwnLog.of(started).id
    spoil(started)
    place = Place.of(started.kit.folder)
    with pytest.raises(ConfigError) as refused:
        start(place.kit.folder)
    text = str(refused.value)
    assert f"the state folder {place.folder} belongs to log {known} (see log-id), but " in text
    assert ("which is empty" in text) == (spoil is not spoil_by_another)
    for word in (str(place.target).removeprefix("sqlite:///"), "correct state_url", "restore"):
        assert word in text
    assert started.blobs.digests() == blobs
    assert (place.folder / LOG_ID).read_text().strip() == known
    if spoil is spoil_by_another:
        (found,) = verify_state(place).problems
        assert (found.rule, found.text in text) == ("own log", True)
    with pytest.raises(ConfigError):  # the refused start has not made it the right one
        start(place.kit.folder)


def test_a_refused_log_is_left_as_it_was(started: Place, postgres: Cluster) -> None:
    """An empty database stays empty: the data can still be moved there."""
    schema = postgres.new_schema()
    keep_log_in(started.kit.folder, postgres.url(schema))
    with pytest.raises(ConfigError, match="belongs to log .* but PostgreSQL .*/flplatform is log"):
        start(started.kit.folder)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = "
    assert postgres.execute(f"{tables}'{schema}'") == [(0,)]


def test_a_state_of_the_release_before(started: Place) -> None:
    """It is tied to its log; unless that is empty, and models are there."""
    (started.folder / LOG_ID).unlink()
    start(started.kit.folder)
    assert OwnLog.of(started).id == origin_of(started)
    (started.folder / LOG_ID).unlink()
    spoil_by_loss(started)
    with pytest.raises(ConfigError, match="there are models in .*/blobs, but the log .* is empty"):
        start(started.kit.folder)
    assert not (started.folder / LOG_ID).exists()


@pytest.mark.parametrize("text", ["", "0" * 31, "\0" * 33])
def test_a_damaged_id_is_named(started: Place, text: str) -> None:
    path = started.folder / LOG_ID
    known = path.read_text()
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path} is damaged: .* remove the file"):
        start(started.kit.folder)
    (found,) = verify_state(started).problems
    assert "state/log-id: own log: " in str(found)
    assert "remove the file" in str(found)
    path.unlink()
    start(started.kit.folder)
    assert path.read_text() == known


def test_a_lost_folder_is_no_new_one(started: Place) -> None:
    path = started.kit.folder.parent / "log.db"
    shutil.copy(started.folder / "events.db", path)
    shutil.rmtree(started.folder)
    place = keep_log_in(started.kit.folder, f"sqlite:///{path}")
    with pytest.raises(ConfigError, match="but the state folder .* is empty; mount the state"):
        start(place.kit.folder)
    (found,) = verify_state(place).problems[:1]
    assert (found.rule, "is empty" in found.text) == ("own log", True)
    noted_in(place).unlink()  # as of a kit that only releases before have served
    with pytest.raises(ConfigError, match="holds events, but the state folder .* is a new one"):
        start(place.kit.folder)
    assert any(each.rule == "own log" for each in verify_state(place).problems)
    write_private(noted_in(place), origin_of(place))
    place.folder.mkdir(exist_ok=True)
    shutil.copy(noted_in(place), place.folder / LOG_ID)  # the operator knows better
    start(place.kit.folder)


def test_the_kit_notes_the_id(started: Place) -> None:
    """Of an older state too, at the first start of a release that knows how to."""
    path = noted_in(started)
    assert path.read_text() == (started.folder / LOG_ID).read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.unlink()
    start(started.kit.folder)
    assert path.read_text() == (started.folder / LOG_ID).read_text()


def lose_folder(place: Place) -> None:
    place.folder.rename(place.kit.folder.parent / "moved")


def lose_mount(place: Place) -> None:
    """Its mount point is there, and what a file system has of its own."""
    lose_folder(place)
    (place.folder / "lost+found").mkdir(parents=True)


def lose_to_another(place: Place) -> None:
    """Something is mounted there, but no state."""
    lose_mount(place)
    (place.folder / "readme.txt").touch()


@pytest.mark.parametrize("lose", [lose_folder, lose_mount, lose_to_another])
def test_a_lost_state_is_missed(started: Place, lose: Callable[[Place], None]) -> None:
    """No server begins anew: the sites would throw their runs away."""
    known, kit = OwnLog.of(started).id, started.kit.folder
    lose(started)
    for _ in range(2):  # the refused start has left nothing that the next takes for a state
        with pytest.raises(ConfigError) as refused:
            start(kit)
        text = str(refused.value)
        assert f"a server has worked on this kit before (log {known}), but " in text
        for word in (str(started.folder), "mount", "restore a backup", f"remove {kit}/{LOG_ID}"):
            assert word in text
        assert not (started.folder / LOG_ID).exists()
        assert not (started.folder / "blobs").exists()
    shutil.rmtree(started.folder, ignore_errors=True)
    (kit.parent / "moved").rename(started.folder)
    start(kit)
    assert OwnLog.of(started).id == known
    assert not verify_state(started).problems


def test_a_lost_state_is_told(started: Place, tmp_path: Path) -> None:
    lose_folder(started)
    (found,) = verify_state(started).problems
    assert (found.where, found.rule) == ("state", "own log")
    assert "is empty" in found.text
    with pytest.raises(ConfigError, match="is empty; mount the state folder"):
        back_up(started, tmp_path / "b")
    noted_in(started).write_text("odd")
    (found,) = verify_state(started).problems
    assert "log-id is damaged" in found.text
    with pytest.raises(ConfigError, match="log-id is damaged: .* remove .*/kit/log-id"):
        start(started.kit.folder)


def test_a_lost_state_is_restored(started: Place, tmp_path: Path) -> None:
    known = OwnLog.of(started).id
    back_up(started, tmp_path / "b")
    lose_folder(started)
    restore(tmp_path / "b", started)
    start(started.kit.folder)
    assert OwnLog.of(started).id == OwnLog.of(started).noted == known


def test_a_restored_state_is_followed(started: Place, place: Place, tmp_path: Path) -> None:
    """Also that of a release before, which has no id and no event; then nothing tells of a loss."""
    write_private(noted_in(place), "a" * 32)
    with closing(sqlite3.connect(place.folder / "events.db")) as database:
        database.executescript(
            "DELETE FROM events; DROP TABLE origin; UPDATE schema_version SET version = 2"
        )
    (place.folder / LOG_ID).unlink()
    for path in (place.folder / "blobs").glob("?" * 64):
        path.unlink()
    back_up(place, tmp_path / "b", damaged=True)
    restore(tmp_path / "b", place, move_aside=True, damaged=True)
    assert not noted_in(place).exists()
    start(place.kit.folder)
    assert OwnLog.of(place).noted == origin_of(place)


def test_another_state_is_followed(
    started: Place, caplog: pytest.LogCaptureFixture
) -> None:  # put there on purpose
    known = OwnLog.of(started).id
    write_private(noted_in(started), "a" * 32)
    start(started.kit.folder)
    assert OwnLog.of(started).noted == known
    assert f"the state is another than before: log {known}, not {'a' * 32}" in caplog.text


@pytest.mark.parametrize("text", ["", "odd"])
def test_a_damaged_note_is_written_anew(started: Place, text: str) -> None:
    noted_in(started).write_text(text)
    start(started.kit.folder)
    assert OwnLog.of(started).noted == OwnLog.of(started).id


def test_a_kit_that_cannot_be_written(started: Place, caplog: pytest.LogCaptureFixture) -> None:
    noted_in(started).unlink()
    noted_in(started).mkdir()
    start(started.kit.folder)
    assert "a loss of the state folder would go unnoticed: " in caplog.text
    lose_folder(started)
    with pytest.raises(ConfigError, match="log-id cannot be read: Is a directory"):
        start(started.kit.folder)


def test_to_begin_anew(started: Place) -> None:
    known = OwnLog.of(started).id
    lose_folder(started)
    noted_in(started).unlink()
    start(started.kit.folder)
    assert OwnLog.of(started).id == OwnLog.of(started).noted != known


def test_a_backup_carries_it(started: Place, postgres: Cluster, tmp_path: Path) -> None:
    """From SQLite to PostgreSQL and back."""
    known, kit = OwnLog.of(started).id, started.kit.folder
    back_up(started, tmp_path / "one")
    shutil.rmtree(started.folder)
    there = keep_log_in(kit, postgres.url(postgres.new_schema()))
    with closing(open_store(there.target)):
        assert origin_of(there) != known
    restore(tmp_path / "one", there)
    assert origin_of(there) == OwnLog.of(there).id == known
    start(kit)
    back_up(there, tmp_path / "two")
    with snapshot(tmp_path / "two" / "events.db") as log:
        assert log.origin == known
    (kit / "local" / "resources.yml").write_text("reserve_bytes: 0\n")
    here = Place.of(kit)
    restore(tmp_path / "two", here, move_aside=True)
    assert origin_of(here) == OwnLog.of(here).id == known
    start(kit)
    assert not verify_state(here, deep=True).problems


def test_a_dump_carries_it(started: Place, postgres: Cluster, tmp_path: Path) -> None:
    known, kit, schema = OwnLog.of(started).id, started.kit.folder, postgres.new_schema()
    back_up(started, tmp_path / "b")
    there = keep_log_in(kit, postgres.url(schema))
    restore(tmp_path / "b", there, move_aside=True)
    postgres.execute("CREATE DATABASE moved")
    login = ["-h", postgres.folder, "-U", OWNER]
    dump, programs = tmp_path / "dump.sql", binaries()
    assert programs is not None
    subprocess.run([programs / "pg_dump", *login, "-n", schema, "-f", dump, OWNER], check=True)
    subprocess.run([programs / "psql", *login, "-q", "-v", "ON_ERROR_STOP=1", "-f", dump, "moved"],
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    moved = keep_log_in(kit, postgres.url(schema).replace(f"/{OWNER}?", "/moved?"))
    assert origin_of(moved) == known
    start(kit)


def test_a_backup_of_the_release_before(place: Place, tmp_path: Path, postgres: Cluster) -> None:
    (place.kit.folder / "local" / "resources.yml").write_text("reserve_bytes: 0\n")
    with closing(sqlite3.connect(place.folder / "events.db")) as database:
        database.executescript("DROP TABLE origin; UPDATE schema_version SET version = 2")
    (place.folder / LOG_ID).unlink()
    back_up(place, tmp_path / "b")
    restore(tmp_path / "b", place, move_aside=True)
    assert not (place.folder / LOG_ID).exists()
    start(place.kit.folder)
    assert OwnLog.of(place).id == origin_of(place) != ""
    shutil.rmtree(place.folder)
    there = keep_log_in(place.kit.folder, postgres.url(postgres.new_schema()))
    restore(tmp_path / "b", there)
    start(there.kit.folder)
    assert OwnLog.of(there).id == origin_of(there) != ""


def test_a_state_that_lies_apart_is_not_backed_up(started: Place, tmp_path: Path) -> None:
    spoil_by_another(started)
    place = Place.of(started.kit.folder)
    with pytest.raises(DataLossError, match="own log: the state folder state belongs to log"):
        back_up(place, tmp_path / "b")
    back_up(place, tmp_path / "b", damaged=True)
    restore(tmp_path / "b", place, move_aside=True, damaged=True)
    start(place.kit.folder)


def test_no_server_begins_while_a_restore_has_not_ended(started: Place) -> None:
    Unfinished(backup="/b", options=(), stamp="1", had_state=True, had_log=True).begin(
        started.kit.folder
    )
    with pytest.raises(ConfigError, match="a restore did not end"):
        start(started.kit.folder)
