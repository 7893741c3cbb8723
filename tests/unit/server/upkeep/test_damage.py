"""No damage of a row, a page or a file hides the others; nor does a server at work."""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import DataLossError
from flplatform.core.ports import Row
from flplatform.files.digest import digest_of_file
from flplatform.server.upkeep import files, history
from flplatform.server.upkeep import place as place_module
from flplatform.server.upkeep import verify as verify_module
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.findings import Finding
from flplatform.server.upkeep.place import Place, needs_of
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import Snapshot, open_store

Sql = Callable[..., None]


def problems(place: Place, deep: bool = False) -> list[Finding]:
    return verify_state(place, deep).problems


def the_one(place: Place, deep: bool = False) -> str:
    """The one problem of a state, as it is shown."""
    (found,) = problems(place, deep)
    return str(found)


def rows_of(place: Place, stream: str, kind: type[ev.Event]) -> list[Row]:
    with place.snapshot() as log:
        return [row for row in log.read(stream) if row.type == kind.__name__]


def blob_of(place: Place, run: int) -> Path:
    needs = needs_of(place.history())
    digest = next(key for key, need in needs.items() if need.runs[:1] == (run,) and need.is_model)
    return place.blobs.file(digest)


# ---- rows


BAD_ROWS = {
    "body": ("body=cast(x'7bff7d' as text)", "body holds bytes that are no text"),
    "blob": ("body=x'7b7d'", "body is stored as blob, not as text"),
    "time": ("time=x'3030'", "time is stored as blob, not as text"),
    "type": ("type=cast(x'52ff' as text)", "type holds bytes that are no text"),
    "seq": ("seq='abc'", "seq is stored as text, not as integer"),
    "version": ("version=x'31'", "version is stored as blob, not as integer"),
    "stream": ("stream=cast(stream as blob)", "stream is stored as blob, not as text"),
    "deep": (f"body='{'[' * 100_000}'", "does not hold a"),
    "digest": ("body=replace(body, '\"blake3:', '\"blake3;')", "which is no digest"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_damaged_row_is_named_and_other_runs_are_checked(
    place: Place, sql: Sql, tmp_path: Path, case: str
) -> None:
    (row, *_) = rows_of(place, "run/1", ev.UpdateAccepted)
    change_to, text = BAD_ROWS[case]
    sql(f"UPDATE events SET {change_to} WHERE stream='run/1' AND seq={row.seq}")
    sql("DELETE FROM events WHERE stream='run/2' AND seq=3")
    found = [each for each in problems(place) if each.rule == "readable event"]
    assert [(each.where, each.seq) for each in found] == [
        ("run/1", 0 if case == "seq" else row.seq)
    ]
    assert text in found[0].text
    assert any(str(each).startswith("run/2 #3: I1 gapless") for each in problems(place))
    history = place.history()
    assert history.runs[1].state is None
    (said, *rounds) = replay_run(place, 1)
    assert (said.round, said.outcome) == (0, "error")
    assert said.detail.startswith("some of its events cannot be had, the first: run/1 #")
    assert [each.outcome for each in rounds] == ["same"] * 3
    with pytest.raises(DataLossError, match=r"run/\d"):
        back_up(place, tmp_path / "backup")
    made = back_up(place, tmp_path / "backup", damaged=True)
    assert any(text in each for each in made.problems)
    shutil.rmtree(place.folder)
    restore(tmp_path / "backup", place, damaged=True)
    assert text in "".join(map(str, problems(place)))


def test_the_name_of_a_stream_that_is_no_text(place: Place, sql: Sql) -> None:
    sql("UPDATE events SET stream=cast(x'72756eff' as text) WHERE stream='run/2'")
    found = [each for each in problems(place) if each.where.startswith("run\udcff")]
    assert {each.rule for each in found} == {"streams"}
    assert 1 in place.history().runs


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("DELETE FROM schema_version", "does not say which schema it has"),
        ("UPDATE schema_version SET version='two'", "does not say which schema it has"),
        ("UPDATE schema_version SET version=cast(x'ff' as text)", "Could not decode"),
        ("DROP TABLE events", "has lost its events"),
    ],
)
def test_a_database_that_has_lost_its_order(
    place: Place, sql: Sql, statement: str, text: str
) -> None:
    sql(statement)
    assert text in the_one(place)
    with pytest.raises(DataLossError, match=text):
        place.history()


def each_page_lost(place: Place) -> Iterator[None]:
    """Have one page of the log after the other lost."""
    path = place.folder / "events.db"
    with closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
    whole = path.read_bytes()
    for at in range(0, len(whole), size):
        path.write_bytes(whole[:at] + b"\xff" * size + whole[at + size :])
        yield


def test_a_lost_page_is_always_found(place: Place) -> None:
    for _ in each_page_lost(place):
        assert any(each.rule == "I1 database" for each in problems(place))


def test_what_can_be_checked_without_a_log(place: Place, tmp_path: Path) -> None:
    bad = blob_of(place, 1)
    next(each_page_lost(place))
    report = verify_state(place)
    assert {each.rule for each in report.problems} == {"I1 database"}
    assert (report.blobs, report.audit_records) == (0, 5)
    bad.chmod(0o600)
    bad.write_bytes(b"no model")
    bad.chmod(0o444)
    report = verify_state(place, deep=True)
    assert {each.rule for each in report.problems} == {"I1 database", "I5 blob digest"}
    assert (report.blobs, report.audit_records) == (len(place.blobs.digests()), 5)


def test_a_backup_names_the_log_that_is_damaged(place: Place, tmp_path: Path) -> None:
    """And not its copy, of which nothing is left."""
    refusals = []
    for number, _ in enumerate(each_page_lost(place)):
        try:
            back_up(place, tmp_path / f"backup {number}", damaged=True)
        except DataLossError as error:
            refusals.append(str(error))
    assert refusals
    for text in refusals:
        assert str(place.folder / "events.db") in text
        assert str(tmp_path / "backup") not in text


def test_a_server_tells_the_damage_in_one_line(place: Place) -> None:
    path, told = place.folder / "events.db", []
    for _ in each_page_lost(place):
        with pytest.raises(DataLossError) as refused:
            open_store(path)
        told.append(refused.value.message)
    assert all(f"{path} is damaged: " in text and "\n" not in text for text in told)
    assert any("in database main" in text for text in told)


# ---- blobs


def test_one_blob_that_cannot_be_read_does_not_end_the_check(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad, cut = sorted(place.blobs.digests())[:2]
    size = place.blobs.file(cut).stat().st_size
    place.blobs.file(cut).chmod(0o600)
    os.truncate(place.blobs.file(cut), size - 1)
    place.blobs.file(cut).chmod(0o444)

    def damaged(path: Path, *_: Any) -> Any:
        if path.name == place.blobs.file(bad).name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return digest_of_file(path)

    monkeypatch.setattr("flplatform.files.digest.digest_of_file", damaged)
    monkeypatch.setattr("flplatform.server.upkeep.backup.digest_of_file", damaged)
    found = [str(each) for each in problems(place, deep=True)]
    assert [bad in found[0], cut in found[1], len(found)] == [True, True, 2]
    assert "I5 blob: it cannot be read: Input/output error" in found[0]
    made = back_up(place, tmp_path / "backup", damaged=True)
    assert f"blob {bad} cannot be read: Input/output error" in made.problems
    assert any(each.startswith(f"blob {cut} is damaged: its") for each in made.problems)
    assert len(made.problems) == 2


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def file_for_all(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.touch(0o600)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (link_to_itself, "it cannot be read: Too many levels of symbolic links"),
        (folder_there, "it is no plain file"),
        (file_for_all, "state/blobs: blob is there: it is no folder"),
    ],
)
def test_what_is_no_blob_is_named(
    place: Place, spoil: Callable[[Path], None], text: str, tmp_path: Path
) -> None:
    spoil(blob_of(place, 1))
    assert text in "".join(str(each) for each in problems(place))
    with pytest.raises(DataLossError):
        back_up(place, tmp_path / "backup")
    assert back_up(place, tmp_path / "backup", damaged=True).problems


# ---- beside a server


def test_what_a_server_frees_meanwhile_is_not_missing(
    place: Place, monkeypatch: pytest.MonkeyPatch, sql: Sql
) -> None:
    """The log is long: while the blobs are looked at, and looked at again, runs go on."""
    check, read = files.check_blobs, place_module.history_of
    runs, freed = iter((1, 2)), list[str]()

    def free() -> None:
        if run := next(runs, 0):
            deleted = ev.RunDeleted(run=run, by="lead").model_dump_json()
            sql(
                "INSERT INTO events SELECT stream, max(seq) + 1, time, 'RunDeleted', 1, "
                f"'{deleted}' FROM events WHERE stream='federation'"
            )
            for digest in set(place.blobs.digests()) - needs_of(read_now()).keys():
                place.blobs.file(digest).unlink()
                freed.append(digest)

    def read_now() -> history.History:
        with place.snapshot() as log:
            return read(log)

    def slow_check(*args: Any) -> Any:
        free()
        return check(*args)

    def slow_reading(log: Snapshot, wanted: Collection[int] | None = None) -> history.History:
        assert wanted in (None, {1}, {1, 2}, {2})
        found = read(log, wanted)
        free()
        return found

    monkeypatch.setattr(verify_module, "check_blobs", slow_check)
    monkeypatch.setattr(place_module, "history_of", slow_reading)
    report = verify_state(place)
    assert freed
    assert not report.problems


def test_only_the_runs_concerned_are_read_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = blob_of(place, 2), list[str]()
    scan = Snapshot.scan

    def noted(log: Snapshot, stream: str) -> Any:
        read.append(stream)
        return scan(log, stream)

    monkeypatch.setattr(Snapshot, "scan", noted)
    path.unlink()
    assert "it is missing, run 2 needs it" in the_one(place)
    assert read == ["federation", "run/1", "run/2", *["federation", "run/2"] * 2]


def test_parts_come_and_go(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    part = place.blobs.root / "incoming" / "x.part"
    whole = place.blobs.root / ("0" * 64)
    part.touch(0o600)
    whole.touch(0o444)
    listed = Path.iterdir

    def meanwhile(folder: Path) -> Iterator[Path]:
        for path in list(listed(folder)):
            if path in (part, whole):
                path.unlink(missing_ok=True)
            yield path

    monkeypatch.setattr(Path, "iterdir", meanwhile)
    assert not verify_state(place).findings
