"""Backup and restore: whole, or not at all."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    ConfigError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.ports import Row
from flplatform.files.digest import digest_of
from flplatform.files.lock import held
from flplatform.security.audit import AuditLog, KitSeal, records
from flplatform.server.upkeep import backup as backup_module
from flplatform.server.upkeep import place as place_module
from flplatform.server.upkeep import taking
from flplatform.server.upkeep.backup import MANIFEST, back_up
from flplatform.server.upkeep.building import BUILDING
from flplatform.server.upkeep.history import History
from flplatform.server.upkeep.place import Place, needs_of
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import Snapshot, snapshot
from flplatform.store.state import SqlStateStore
from tests.support.federation import provision


@pytest.fixture
def backup(place: Place, tmp_path: Path) -> Path:
    back_up(place, tmp_path / "backup")
    return tmp_path / "backup"


def log_of(place: Place) -> dict[str, list[object]]:
    with place.snapshot() as log:
        return {stream: list(log.read(stream)) for stream in log.streams()}


def test_there_and_back(place: Place, backup: Path) -> None:
    events, blobs = log_of(place), place.blobs.digests()
    users = (place.folder / "users.json").read_text()
    shutil.rmtree(place.folder)
    done = restore(backup, place)
    assert (done.aside, done.other_local) == (None, ())
    assert log_of(place) == events
    assert place.blobs.digests() == blobs
    assert (place.folder / "users.json").read_text() == users
    report = verify_state(place, deep=True)
    assert not report.findings
    last = list(records(place.folder / "audit.jsonl"))[-1]
    assert (last["seq"], last["action"], last["target"]) == (6, "state.restore", str(backup))
    assert not (place.kit.folder / f"state{BUILDING}").exists()


def test_what_a_backup_holds(place: Place, backup: Path) -> None:
    manifest = json.loads((backup / MANIFEST).read_bytes())
    names = set(manifest["files"])
    assert {"events.db", "state/audit.jsonl", "state/audit.jsonl.head", "state/users.json"} <= names
    assert "local/policy.yml" in names
    assert not any("key" in name or "lock" in name or "ready" in name for name in names)
    on_disk = {str(path.relative_to(backup)) for path in backup.rglob("*") if path.is_file()}
    assert on_disk == names | {"manifest.json", "manifest.sig"}
    assert backup.stat().st_mode & 0o777 == 0o700
    one = next((backup / "blobs").iterdir())
    assert one.stat().st_ino == (place.folder / "blobs" / one.name).stat().st_ino


def test_blobs_are_copied_where_links_are_not_wanted_or_cannot_be(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    back_up(place, tmp_path / "one", link=False)
    monkeypatch.setattr(os, "link", no_link)
    back_up(place, tmp_path / "two")
    for target in ("one", "two"):
        assert all(path.stat().st_nlink == 1 for path in (tmp_path / target / "blobs").iterdir())


def test_nothing_is_overwritten(place: Place, backup: Path) -> None:
    with pytest.raises(AlreadyExistsError, match="exists"):
        back_up(place, backup)
    with pytest.raises(InvalidArgumentError, match="lies in .*/state"):
        back_up(place, place.folder / "backup")
    before = log_of(place)
    with pytest.raises(FailedPreconditionError, match="there is a state in"):
        restore(backup, place)
    assert log_of(place) == before
    done = restore(backup, place, move_aside=True)
    assert done.aside is not None
    assert (done.aside / "events.db").exists()
    assert not verify_state(place).problems


def test_a_running_server_is_left_alone(place: Place, backup: Path) -> None:
    in_use = pytest.raises(FailedPreconditionError, match=f"in use by process {os.getpid()}")
    with held(place.lock, "the kit"), in_use:
        restore(backup, place, move_aside=True)
    store = SqlStateStore(place.folder / "events.db", lambda _error: None)
    with closing(store), pytest.raises(FailedPreconditionError, match="has the state"):
        restore(backup, place, move_aside=True)


def test_a_failed_backup_leaves_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_module, "copy_audit", full)
    (tmp_path / "backups").mkdir()
    free = rf"no room .*: \d+ bytes are free on the disk of {tmp_path}/backups \(.*No space left"
    with pytest.raises(ResourceExhaustedError, match=free):
        back_up(place, tmp_path / "backups" / "b")
    assert not [*(tmp_path / "backups").iterdir()]


class Busy:
    """A server at work: each round stages a job of its own blob, and frees that of the last one."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._rounds = 0
        blob = place.blobs.file(place.blobs.digests()[0])
        self._mode = blob.stat().st_mode & 0o777
        self._opened = place.history().runs[1].stream.events[0]

    def go_on(self) -> None:
        self._rounds += 1
        number, (row, opened) = self._rounds, self._opened
        assert isinstance(opened, ev.RunOpened)
        data = f"package {number}".encode()
        path = self._place.blobs.file(digest_of(data))
        path.write_bytes(data)
        path.chmod(self._mode)
        package = ev.Blob(digest=digest_of(data), size=len(data))
        staged = ev.JobStaged(
            name="job", job=opened.job, job_blob=package, model=opened.initial_model,
            parameters=1, has_code=False, by="lead", organisation="",
        )  # fmt: skip
        with closing(SqlStateStore(self._place.folder / "events.db", lambda _error: None)) as store:
            last = store.read(ev.FEDERATION)[-1].seq
            store.append([Row(ev.FEDERATION, last + 1, row.time, *ev.encode(staged))]).result()
        if number > 1:
            self._place.blobs.file(digest_of(f"package {number - 1}".encode())).unlink()


@pytest.mark.parametrize("link", [True, False])
def test_a_server_with_short_rounds_holds_up_no_backup(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    """While the log is read, rounds end: what it needed a moment ago is freed."""
    busy, read = Busy(place), place_module.history_of

    def slowly(log: Snapshot, runs: Collection[int] | None = None) -> History:
        busy.go_on()
        busy.go_on()
        return read(log, runs)

    busy.go_on()
    monkeypatch.setattr(backup_module, "history_of", slowly)
    monkeypatch.setattr(place_module, "history_of", slowly)
    done = back_up(place, tmp_path / "backup", link=link)
    monkeypatch.undo()
    assert not done.problems
    needed = needs_of(history_in(tmp_path / "backup"))
    names = {path.name for path in (tmp_path / "backup" / "blobs").iterdir()}
    assert names == {digest.partition(":")[2] for digest in needed}
    shutil.rmtree(place.folder)
    restore(tmp_path / "backup", place)
    assert not verify_state(place, deep=True).findings


def history_in(backup: Path) -> History:
    with snapshot(backup / "events.db") as log:
        return place_module.history_of(log)


def test_a_server_that_is_always_faster_ends_the_backup(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, copy, told = Busy(place), Snapshot.copy, list[str]()

    def while_rounds_end(log: Snapshot, path: Path) -> None:
        busy.go_on()
        with snapshot(place.target) as now:
            copy(now, path)
        busy.go_on()

    monkeypatch.setattr(Snapshot, "copy", while_rounds_end)
    with pytest.raises(UnavailableError, match="10 times the server freed blobs faster"):
        back_up(place, tmp_path / "backup", progress=told.append)
    assert sum("1 blob not there" in text for text in told) == 10
    assert not [*tmp_path.glob("*backup*")]


def test_what_nobody_needs_is_not_copied(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stray = place.blobs.root / ("0" * 64)
    stray.write_bytes(b"an upload")
    copied, copy = list[str](), taking.copy_file

    def noted(source: Path, *more: Any) -> None:
        copied.append(source.name)
        copy(source, *more)

    stray.chmod(0o444)
    monkeypatch.setattr(taking, "copy_file", noted)
    back_up(place, tmp_path / "backup", link=False)
    assert stray.name not in copied
    assert len(copied) == len(needs_of(place.history()))


def test_blobs_are_read_only_in_a_backup(backup: Path, place: Place, tmp_path: Path) -> None:
    back_up(place, tmp_path / "copied", link=False)
    for folder in (backup, tmp_path / "copied"):
        assert not any(path.stat().st_mode & 0o222 for path in (folder / "blobs").iterdir())


def test_a_state_with_problems(place: Place, tmp_path: Path) -> None:
    lost = place.blobs.digests()[0]
    place.blobs.file(lost).unlink()
    with pytest.raises(DataLossError, match=f"1 problem, the first: blob {lost}: blob is there"):
        back_up(place, tmp_path / "backup")
    made = back_up(place, tmp_path / "backup", damaged=True)
    assert len(made.problems) == 1
    with pytest.raises(FailedPreconditionError, match="had 1 problem, the first: "):
        restore(tmp_path / "backup", place, move_aside=True)
    restore(tmp_path / "backup", place, move_aside=True, damaged=True)
    assert [each.rule for each in verify_state(place).problems] == ["blob is there"]


def spoil_database(place: Place) -> None:
    with (place.folder / "events.db").open("r+b") as file:
        file.seek(36)
        file.write((7).to_bytes(4, "big"))  # pages that are free


def spoil_audit(place: Place) -> None:
    path = place.folder / "audit.jsonl"
    path.write_text(path.read_text().replace("command 2", "command 9"))


def spoil_users(place: Place) -> None:
    (place.folder / "users.json").write_text('{"a": ')


def spoil_rights(place: Place) -> None:
    (place.folder / "users.json").chmod(0o644)


def spoil_links(place: Place) -> None:
    (place.folder / "metrics" / "out").symlink_to("/etc/passwd")


def spoil_log(place: Place) -> None:
    with closing(sqlite3.connect(place.folder / "events.db")) as database:
        database.execute("DELETE FROM events")
        database.commit()


def spoil_blob(place: Place) -> None:
    path = place.blobs.file(place.blobs.digests()[0])
    path.rename(place.kit.folder / "moved")
    path.symlink_to(place.kit.folder / "moved")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_database, "events.db: I1 database: "),
        (spoil_audit, "state/audit.jsonl: I7 audit chain: state/audit.jsonl:3: this record was"),
        (spoil_users, "state/users.json: I5 whole file: not JSON"),
        (spoil_rights, "state/users.json: rights: mode 0644 lets others in"),
        (spoil_links, "state/metrics/out: rights: is a symbolic link"),
        (spoil_log, "event log: I1 database: it is empty, but there are "),
        (spoil_blob, "rights: is a symbolic link"),
    ],
)
def test_a_state_in_which_verify_finds_something(
    place: Place, tmp_path: Path, spoil: Callable[[Place], None], text: str
) -> None:
    spoil(place)
    assert verify_state(place).problems
    with pytest.raises(DataLossError) as caught:
        back_up(place, tmp_path / "backup")
    assert text in str(caught.value)
    assert ".tmp-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    made = back_up(place, tmp_path / "backup", damaged=True)
    assert any(text in each for each in made.problems)
    assert ".tmp-" not in str(made.problems)


def test_all_problems_are_counted(place: Place, tmp_path: Path) -> None:
    for digest in place.blobs.digests()[:3]:
        place.blobs.file(digest).unlink()
    with pytest.raises(DataLossError, match="the state has 3 problems, the first: blob "):
        back_up(place, tmp_path / "backup")


def test_an_error_names_no_folder_that_has_gone(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error", str(target / "audit.jsonl"))

    monkeypatch.setattr(backup_module, "copy_audit", full)
    with pytest.raises(OSError, match="Input/output") as caught:
        back_up(place, tmp_path / "b")
    assert caught.value.filename == str(tmp_path / "b" / "state" / "audit.jsonl")


def damage_nothing_of(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"runs": 2', '"runs": 3'))


def damage_users(folder: Path) -> None:
    (folder / "state" / "users.json").write_text('{"mallory": "project_admin"}')


def damage_log(folder: Path) -> None:
    with (folder / "events.db").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")


def damage_blob(folder: Path) -> None:
    next((folder / "blobs").iterdir()).unlink()


@pytest.mark.parametrize(
    ("damage", "kind", "text"),
    [
        (damage_nothing_of, NotFoundError, "is no backup"),
        (damage_manifest, UnauthenticatedError, "does not fit its text"),
        (damage_users, DataLossError, "users.json was changed or damaged"),
        (damage_log, DataLossError, "events.db was changed or damaged"),
        (damage_blob, DataLossError, "is missing"),
    ],
)
def test_a_damaged_backup_changes_nothing(
    place: Place,
    backup: Path,
    damage: Callable[[Path], None],
    kind: type[FLError],
    text: str,
) -> None:
    before = sorted(place.kit.folder.rglob("*"))
    damage(backup)
    with pytest.raises(kind, match=text):
        restore(backup, place, move_aside=True)
    assert [path for path in sorted(place.kit.folder.rglob("*")) if path != place.lock] == before


def test_a_backup_of_another_federation(backup: Path, tmp_path: Path) -> None:
    other = provision(tmp_path, ("a",), project="other")
    with pytest.raises((ConfigError, UnauthenticatedError)):
        restore(backup, Place.of(other.server))
    assert not (other.server / "state").exists()


def test_local_files_stay_unless_asked_for(place: Place, backup: Path) -> None:
    policy = place.kit.folder / "local" / "policy.yml"
    before = policy.read_text()
    policy.write_text("allow_root: true\n")
    (place.kit.folder / "local" / "overrides.yml").unlink()
    done = restore(backup, place, move_aside=True)
    assert done.other_local == (str(policy),)
    assert (place.kit.folder / "local" / "overrides.yml").exists()
    restore(backup, place, move_aside=True, with_local=True)
    assert policy.read_text() == before


def test_a_restore_that_was_cut_off_can_be_done_again(
    place: Place, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place.folder)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flplatform.server.upkeep.restore._swap", cut)
        with pytest.raises(KeyboardInterrupt):
            restore(backup, place)
    assert not place.folder.exists()
    restore(backup, place)
    assert not verify_state(place, deep=True).problems


def test_a_log_that_is_kept_elsewhere(place: Place, backup: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere' / 'log.db'}"
    (place.kit.folder / "local" / "resources.yml").write_text(f"state_url: {url}\n")
    shutil.rmtree(place.folder)
    there = Place.of(place.kit.folder)
    restore(backup, there)
    assert (tmp_path / "elsewhere" / "log.db").exists()
    assert not verify_state(there, deep=True).problems
    with pytest.raises(FailedPreconditionError, match="there is a state in"):
        restore(backup, there)
    back_up(there, tmp_path / "again")
    restore(tmp_path / "again", there, move_aside=True)
    assert len([*(tmp_path / "elsewhere").glob("log.db.before-*")]) == 1
    assert not verify_state(there).problems


def test_the_audit_is_copied_while_it_is_written(place: Place, tmp_path: Path) -> None:
    path = place.folder / "audit.jsonl"
    audit = AuditLog(path, "server", rotate_bytes=1000, seal=KitSeal(place.kit))
    for number in range(20):
        audit.record({"name": "lead"}, f"later {number}", "allowed")
    with path.open("ab") as file:
        file.write(b'{"seq": 26, "torn')
    back_up(place, tmp_path / "backup")
    audit.close()
    restore(tmp_path / "backup", place, move_aside=True)
    assert verify_state(place).audit_records == 26  # 25, and that of the restore
    assert not verify_state(place).problems
