"""A log that has lost its end names no model that came after it: none of them is removed."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.ports import Row
from flplatform.server.server import FederatedServer
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.log_head import LOG_HEAD, LogHead
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import open_store
from tests.unit.server.scene import play

OLD_S = 100_000.0


def serve(kit: Path) -> str:
    """Have a server go on with its log, collect what is unused and store an event.

    Returns:
        What it says of events that are lost.
    """
    told = []

    async def it() -> None:
        server = FederatedServer(Place.of(kit).kit, lambda _restart: None)
        server.runs.open()
        await server.control.staging.collect()
        told.append(server.control.server().trouble)
        await server.runs.set_enabled("a", False, "lead")
        await server.stop()

    play(it())
    return told[0]


@pytest.fixture
def used(kit: Path) -> Place:
    """A state whose server has stored an event since it notes the last one; all blobs are old."""
    (kit / "local" / "resources.yml").write_text("reserve_bytes: 0\n")
    assert serve(kit) == ""
    place = Place.of(kit)
    for digest in place.blobs.digests():
        os.utime(place.blobs.path(digest), (time.time() - OLD_S,) * 2)
    return place


def lose_run(place: Place) -> None:
    """Put an older log back: of before run 2."""
    with closing(sqlite3.connect(place.folder / "events.db")) as database:
        database.execute("DELETE FROM events WHERE stream = 'run/2'")
        database.execute("DELETE FROM events WHERE stream = 'federation' AND seq > 2")
        database.commit()


def lose_last(place: Place) -> None:
    with closing(sqlite3.connect(place.folder / "events.db")) as database:
        database.execute("DELETE FROM events WHERE rowid = (SELECT max(rowid) FROM events)")
        database.commit()


def test_the_last_event_is_noted(used: Place) -> None:
    with used.snapshot() as log:
        last = log.read(ev.FEDERATION)[-1]
    text = (used.folder / LOG_HEAD).read_text()
    for part in (ev.FEDERATION, f" {last.seq},", last.time):
        assert part in text
    assert (used.folder / LOG_HEAD).stat().st_mode & 0o777 == 0o600
    assert serve(used.kit.folder) == ""
    assert (used.folder / LOG_HEAD).read_text() != text
    assert not verify_state(used).problems


@pytest.mark.parametrize("lose", [lose_run, lose_last])
def test_no_model_is_removed_for_want_of_its_event(
    used: Place, lose: Callable[[Place], None]
) -> None:
    before, kit = used.blobs.digests(), used.kit.folder
    head = (used.folder / LOG_HEAD).read_text()
    lose(used)
    (found,) = verify_state(used).problems
    assert (found.where, found.rule) == ("state/log-head", "own log")
    for _ in range(5):  # also when the log is as long again as it was
        told = serve(kit)
        for word in ("has lost its end, or is an older one", "remove state/log-head"):
            assert word in told
    assert used.blobs.digests() == before
    assert (used.folder / LOG_HEAD).read_text() == head
    (used.folder / LOG_HEAD).unlink()  # the operator means it
    assert serve(kit) == ""
    assert not verify_state(used).problems
    assert (len(used.blobs.digests()) < len(before)) == (lose is lose_run)


def test_the_end_of_a_write_ahead_log_that_is_damaged(used: Place) -> None:
    """SQLite reads it as far as it is whole, and says nothing."""
    folder, copy = used.folder, used.folder.with_name("copy")
    with closing(open_store(folder / "events.db")) as store:
        store.committed = LogHead(folder).note
        for seq in (1, 2, 3):
            store.append([Row("run/3", seq, f"moment {seq}", "RunEnded", 1, "{}")]).result()
        shutil.copytree(folder, copy)
    wal = copy / "events.db-wal"
    data = bytearray(wal.read_bytes())
    data[-100] ^= 1
    wal.write_bytes(data)
    head = LogHead(copy)
    with closing(open_store(copy / "events.db")) as store:
        assert [row.seq for row in store.read("run/3")] == [1, 2]
        assert "event 3 of run/3, stored at moment 3" in head.why_behind("it", store.read)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", ""),
        (b"\0" * 256, ""),
        (b"x" * 300, "log-head is damaged: "),
        (b"{}", "log-head is damaged: "),
        (b'{"stream": "federation", "seq": "1", "time": ""}', "log-head is damaged: "),
        (b'{"stream": "run/1", "seq": 7, "time": ""}', "event 7 of run/1, stored at "),
    ],
)
def test_a_damaged_note_is_named(tmp_path: Path, text: bytes, told: str) -> None:
    (tmp_path / LOG_HEAD).write_bytes(text)
    found = LogHead(tmp_path).why_behind("it", lambda _stream: [])
    assert (told in found) if told else not found


def test_a_note_that_cannot_be_written_or_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = LogHead(tmp_path)
    (tmp_path / LOG_HEAD).mkdir()
    head.note(Row(ev.FEDERATION, 1, "", "", 1, ""))
    assert "log-head stays at an older event: " in caplog.text
    assert "log-head cannot be read: Is a directory" in head.why_behind("it", lambda _stream: [])


def test_a_backup_does_not_carry_it(used: Place, tmp_path: Path) -> None:
    """What is restored is meant."""
    back_up(used, tmp_path / "b")
    assert not (tmp_path / "b" / "state" / LOG_HEAD).exists()
    assert serve(used.kit.folder) == ""
    restore(tmp_path / "b", used, move_aside=True)
    assert not verify_state(used).problems
    assert serve(used.kit.folder) == ""


def test_a_log_without_its_end_is_not_backed_up(used: Place, tmp_path: Path) -> None:
    lose_last(used)
    with pytest.raises(Exception, match="own log: .*has lost its end"):
        back_up(used, tmp_path / "b")
