"""Backup and restore: whole, or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

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
    UnauthenticatedError,
)
from flplatform.files.lock import held
from flplatform.security.audit import AuditLog, KitSeal, records
from flplatform.server.upkeep import backup as backup_module
from flplatform.server.upkeep.backup import MANIFEST, back_up
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.replay import replay_run
from flplatform.server.upkeep.restore import BUILDING, restore
from flplatform.server.upkeep.verify import verify_state
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
    assert not (place.kit.folder / BUILDING).exists()


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
    with pytest.raises(InvalidArgumentError, match="lies in the state"):
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

    monkeypatch.setattr(backup_module, "_copy_audit", full)
    (tmp_path / "backups").mkdir()
    with pytest.raises(OSError, match="No space"):
        back_up(place, tmp_path / "backups" / "b")
    assert not [*(tmp_path / "backups").iterdir()]


def test_a_blob_that_is_freed_meanwhile_asks_for_a_newer_log(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the run was deleted between the copy of the log and that of the blobs."""
    take, calls = backup_module._take, []

    def freed(place: Place, digest: str, folder: Path, link: bool) -> bool:
        if not calls:
            with closing(SqlStateStore(place.folder / "events.db", lambda _error: None)) as store:
                last = store.read(ev.FEDERATION)[-1]
                event = ev.encode(ev.RunDeleted(run=1, by="lead"))
                row = type(last)(last.stream, last.seq + 1, last.time, *event)
                store.append([row]).result()
            kept = set(backup_module.needs_of(place.history()))
            for each in set(place.blobs.digests()) - kept:
                place.blobs.file(each).unlink()
        calls.append(digest)
        return take(place, digest, folder, link)

    monkeypatch.setattr(backup_module, "_take", freed)
    manifest = back_up(place, tmp_path / "backup")
    assert not manifest.problems
    shutil.rmtree(place.folder)
    restore(tmp_path / "backup", place)
    assert not verify_state(place, deep=True).findings


def test_a_state_with_problems(place: Place, tmp_path: Path) -> None:
    lost = place.blobs.digests()[0]
    place.blobs.file(lost).unlink()
    with pytest.raises(DataLossError, match=f"1 problems, the first: blob {lost} is missing"):
        back_up(place, tmp_path / "backup")
    made = back_up(place, tmp_path / "backup", damaged=True)
    assert len(made.problems) == 1
    with pytest.raises(FailedPreconditionError, match="had 1 problems"):
        restore(tmp_path / "backup", place, move_aside=True)
    restore(tmp_path / "backup", place, move_aside=True, damaged=True)
    assert [each.rule for each in verify_state(place).problems] == ["blob is there"]


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


# ---- replay


def test_every_round_can_be_computed_again(place: Place) -> None:
    before = place.blobs.digests()
    found = list(replay_run(place, 1))
    assert [(each.round, each.outcome) for each in found] == [(n, "same") for n in (1, 2, 3)]
    assert [each.outcome for each in replay_run(place, 1, 2)] == ["same"]
    assert place.blobs.digests() == before
    with pytest.raises(NotFoundError, match="no closed round 9"):
        list(replay_run(place, 1, 9))
    with pytest.raises(NotFoundError, match="there are runs 1 to 2"):
        list(replay_run(place, 3))


def test_a_freed_input_and_a_damaged_one(place: Place) -> None:
    closed = [e for e in place.history().runs[1].stream.only() if isinstance(e, ev.RoundClosed)]
    freed = place.blobs.file(closed[0].contributions[0].digest)
    freed.unlink()
    damaged = place.blobs.file(closed[1].contributions[1].digest)
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 0x40
    damaged.chmod(0o600)
    damaged.write_bytes(data)
    found = {each.round: each for each in replay_run(place, 1)}
    assert found[1].outcome == "freed"
    assert found[2].outcome == "differs"
    assert "model made now" in found[2].detail
    assert "the update of b is damaged" in found[2].detail
    assert found[3].outcome == "same"


def test_a_model_that_is_not_what_the_round_gives(place: Place, sql: Callable[..., None]) -> None:
    with place.snapshot() as log:
        rows = [row for row in log.read("run/1") if row.type == "ModelPublished"]
    body = json.loads(rows[2].body) | {"model": json.loads(rows[1].body)["model"]}
    sql(f"UPDATE events SET body='{json.dumps(body)}' WHERE stream='run/1' AND seq={rows[2].seq}")
    assert [each.outcome for each in replay_run(place, 1)] == ["same", "same", "differs"]
