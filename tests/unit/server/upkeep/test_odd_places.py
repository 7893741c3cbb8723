"""States on linked, full, read-only and unreadable disks: told, backed up, or refused by name."""

import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.backups import verify_backup
from flplatform.server.upkeep.log_id import LOG_ID
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.verify import verify_state
from flplatform.store import reading
from flplatform.store.snapshot import snapshot
from flplatform.store.state import SqlStateStore

Sql = Callable[..., None]


def problems(place: Place) -> list[str]:
    return [str(each) for each in verify_state(place).problems]


@contextmanager
def closed_to_us(patch: pytest.MonkeyPatch, *closed: Path) -> Iterator[None]:
    """Have the system refuse to read these, whoever runs the tests."""
    real = {name: getattr(os, name) for name in ("access", "scandir", "lstat", "stat", "open")}

    def is_closed(path: Any) -> bool:
        return any(Path(path) == each for each in closed)

    def is_inside(path: Any) -> bool:
        return any(each in Path(path).parents for each in closed)

    def refusing(name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int) and (
                is_inside(path) or (name in ("scandir", "open") and is_closed(path))
            ):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[name](path, *args, **kwargs)

        return call

    with patch.context() as patched:
        for name in ("scandir", "lstat", "stat", "open"):
            patched.setattr(os, name, refusing(name))
        patched.setattr(
            os, "access", lambda path, mode: not is_closed(path) and real["access"](path, mode)
        )
        patched.setattr(os, "listdir", lambda path: [each.name for each in os.scandir(path)])
        patched.setattr("io.open", lambda path, *args, **kwargs: _opened(path, *args, **kwargs))
        yield


def _opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if not isinstance(path, int) and "r" in mode:
        os.close(os.open(path, os.O_RDONLY))
    return open(path, mode, *args, **kwargs)  # noqa: PTH123, SIM115


# ---- links


def test_state_and_logs_may_be_links(place: Place, tmp_path: Path) -> None:
    (place.kit.folder / "logs").mkdir(0o700)
    for name in ("state", "logs"):
        (place.kit.folder / name).rename(tmp_path / f"big-{name}")
        (place.kit.folder / name).symlink_to(tmp_path / f"big-{name}")
    assert not verify_state(place, deep=True).findings
    back_up(place, tmp_path / "b")
    (tmp_path / "big-state").chmod(0o755)
    (shown,) = problems(place)
    assert shown.startswith("state: rights: mode 0755 lets others in")


def test_nobody_is_told_to_remove_a_link(place: Place, tmp_path: Path) -> None:
    for path in (place.folder / "users.json", place.folder / "metrics"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    shown = problems(place)
    assert [each.partition(": rights: ")[2] for each in sorted(shown)] == [
        "is a symbolic link; put the folder itself there",
        "is a symbolic link; put the file itself there",
    ]


def test_linked_local_files_are_backed_up(place: Place, tmp_path: Path) -> None:
    """As configuration managers and Kubernetes make them."""
    local = place.kit.folder / "local"
    (local / "..1").mkdir(0o700)
    (local / "policy.yml").rename(local / "..1" / "policy.yml")
    (local / "..data").symlink_to("..1")
    (local / "policy.yml").symlink_to("..data/policy.yml")
    made = back_up(place, tmp_path / "b")
    assert "local/policy.yml" in made.files
    assert not (tmp_path / "b" / "local" / "policy.yml").is_symlink()
    (tmp_path / "more").mkdir()
    (local / "more").symlink_to(tmp_path / "more")
    with pytest.raises(DataLossError, match="local/more is a link to a folder elsewhere"):
        back_up(place, tmp_path / "c")


# ---- what cannot be read


def test_a_folder_that_cannot_be_read(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_to_us(monkeypatch, place.folder / "metrics"):
        (shown,) = problems(place)
        assert "state/metrics: rights: what is in it cannot be read: Permission denied" in shown
        with pytest.raises(DataLossError, match="state/metrics: rights"):
            back_up(place, tmp_path / "b")
        made = back_up(place, tmp_path / "b", damaged=True)
    assert any("state/metrics cannot be read" in each for each in made.problems)


def test_a_local_folder_that_cannot_be_read(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.kit.folder / "local" / "more").mkdir()
    refused = pytest.raises(DataLossError, match="local/more cannot be read")
    with closed_to_us(monkeypatch, place.kit.folder / "local" / "more"), refused:
        back_up(place, tmp_path / "b")


def test_a_blob_of_somebody_else(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = next(path for path in place.blobs.root.iterdir() if path.is_file())
    with closed_to_us(monkeypatch, blob):
        (shown,) = problems(place)
    assert f"state/blobs/{blob.name}: rights: mode 0444, owner {os.geteuid()}: user id" in shown


def test_a_blobs_folder_that_cannot_be_read(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_to_us(monkeypatch, place.blobs.root):
        (shown,) = problems(place)
        assert "state/blobs: rights: what is in it cannot be read" in shown
        made = back_up(place, tmp_path / "b", damaged=True)
    assert sum(": Permission denied" in each for each in made.problems) > 10
    assert "events.db" in made.files


def test_an_audit_that_cannot_be_read(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_to_us(monkeypatch, place.folder / "audit.jsonl"):
        made = back_up(place, tmp_path / "b", damaged=True)
    assert "state/audit.jsonl cannot be read: Permission denied" in made.problems
    assert "state/audit.jsonl.head" in made.files


def test_logs_for_others_stop_no_backup(place: Place, tmp_path: Path) -> None:
    (place.kit.folder / "logs").mkdir(0o700, exist_ok=True)
    (place.kit.folder / "logs" / "server.log.1.gz").touch(0o640)
    (place.kit.folder / "logs" / "server.log.1.gz").chmod(0o640)
    assert len(problems(place)) == 1
    back_up(place, tmp_path / "b")
    (place.folder / "users.json").chmod(0o640)
    with pytest.raises(DataLossError, match=r"lets others in; run: chmod 600 .*; fl_state verify"):
        back_up(place, tmp_path / "c")


def test_a_log_elsewhere_that_others_can_write(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "ext"
    folder.mkdir(0o700)
    shutil.move(place.folder / "events.db", folder / "log.db")
    (place.kit.folder / "local" / "resources.yml").write_text(
        f"state_url: sqlite:///{folder}/log.db\n"
    )
    here = Place.of(place.kit.folder)
    assert not problems(here)
    (folder / "log.db").chmod(0o666)
    folder.chmod(0o777)
    first, *_, second = problems(here)
    assert first.startswith(f"{folder}/log.db: rights: mode 0666 lets others in")
    assert second.startswith(f"{folder}: rights: mode 0777 lets others put another event log")
    assert f"chmod go-w {folder}" in second


def test_a_missing_id_of_the_log_is_information(place: Place) -> None:
    (place.folder / LOG_ID).unlink()
    report = verify_state(place)
    assert not report.problems
    assert "state/log-id: own log: it is missing" in str(report.notes[0])


# ---- where the log cannot be opened as it lies


def no_index(place: Place) -> Path:
    """Have SQLite fail to make its index beside a log that a server has written."""
    path = place.folder / "events.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    path.with_name("events.db-shm").unlink(missing_ok=True)
    path.with_name("events.db-shm").symlink_to("events.db-shm")
    return path


def test_a_stopped_log_is_read_where_nothing_can_be_written(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_index(place)
    assert len(place.history().runs) == 2
    (place.folder / "events.db-shm").unlink()
    monkeypatch.setattr(reading, "_why_not", lambda _uri: "disk I/O error")
    assert not verify_state(place, deep=True).problems
    assert back_up(place, tmp_path / "b").runs == 2
    assert verify_backup(tmp_path / "b", place.kit)[1].problems == []


def test_the_log_of_a_killed_server_is_read_in_a_copy(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last transaction is in the write-ahead log alone."""
    path = no_index(place)
    whole, wal = path.read_bytes(), Path(f"{path}-wal")
    Path(f"{path}-shm").unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("DELETE FROM events WHERE stream='run/2' AND seq=3")
        database.commit()
        data = wal.read_bytes()
    path.write_bytes(whole)
    wal.write_bytes(data)
    Path(f"{path}-shm").unlink(missing_ok=True)
    Path(f"{path}-shm").symlink_to("events.db-shm")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = place.history().findings
    assert any("run/2 #3: I1 gapless stream" in str(each) for each in found)
    assert not [*tmp_path.glob("fl_state-*")]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UnavailableError, match="nor can a copy .* No space left") as caught:
        place.history()
    assert "TMPDIR" in str(caught.value)


def test_a_log_that_is_written_meanwhile_is_not_read_without_its_index(place: Place) -> None:
    path = no_index(place)
    written = pytest.raises(UnavailableError, match="was written while it was read")
    with written, snapshot(path) as log:
        log.streams()
        os.utime(path)
    path.with_name("events.db.lock").touch()
    with path.with_name("events.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="events.db: ") as caught:
            place.history()
    assert "run this as the account" in str(caught.value)


def test_a_damaged_definition_of_a_table_is_damage(place: Place, tmp_path: Path) -> None:
    path = place.folder / "events.db"
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE events", b"CRE\xf3TE TABLE events"))
    assert "I1 database: " in problems(place)[0]
    with pytest.raises(DataLossError, match="restore it from a backup"):
        back_up(place, tmp_path / "b", damaged=True)
    with pytest.raises(DataLossError, match="is damaged"):
        SqlStateStore(path, lambda _error: None)


# ---- the target


def test_a_full_target(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect

    def small(target: Any, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        database = connect(target, *args, **kwargs)
        if "mode=ro" not in str(target):
            database.execute("PRAGMA max_page_count=2")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    (tmp_path / "to").mkdir()
    text = rf"\d+ bytes are free on the disk of {tmp_path}/to \({tmp_path}/to/b/events.db cannot be"
    with pytest.raises(ResourceExhaustedError, match=text):
        back_up(place, tmp_path / "to" / "b")
    assert not [*(tmp_path / "to").iterdir()]


@pytest.mark.parametrize("name", ["local/b", "state/b", "logs/b", "state/blobs/b"])
def test_a_target_in_what_is_copied(place: Place, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="lies in"):
        back_up(place, place.kit.folder / name)
    assert not (place.kit.folder / name).exists()


def test_a_target_that_is_a_link_to_nothing(place: Place, tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AlreadyExistsError, match="exists"):
        back_up(place, tmp_path / "b")


def test_what_killed_backups_have_left_is_removed(place: Place, tmp_path: Path) -> None:
    to = tmp_path / "to"
    killed, at_work, other, empty = (to / f".tmp-{each * 16}-old" for each in "0123")
    for folder in (killed, at_work, other):
        (folder / "blobs").mkdir(0o700, parents=True)
        (folder / "events.db").touch()
    (other / "thesis.tex").touch()
    empty.mkdir()
    said: list[str] = []
    handle = os.open(at_work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        back_up(place, to / "new", progress=said.append)
    finally:
        os.close(handle)
    assert {*to.iterdir()} == {at_work, other, empty, to / "new"}
    assert f"removed {killed}, which a backup that was killed had left" in said


def test_a_backup_at_work_is_left_alone(place: Place, tmp_path: Path) -> None:
    left: list[Path] = []

    def another(text: str) -> None:
        if text.startswith("checking") and not left:
            left.extend(tmp_path.glob(".tmp-*"))
            back_up(place, tmp_path / "two")

    back_up(place, tmp_path / "one", progress=another)
    assert len(left) == 1
    assert (tmp_path / "one" / "manifest.json").exists()
    assert (tmp_path / "two" / "manifest.json").exists()
