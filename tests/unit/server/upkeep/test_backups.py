"""A backup is checked where it lies."""

from pathlib import Path

import pytest

from flplatform.core.errors import NotFoundError
from flplatform.server.upkeep.backup import MANIFEST, back_up
from flplatform.server.upkeep.backups import is_backup, verify_backup
from flplatform.server.upkeep.place import Place
from tests.support.federation import provision


@pytest.fixture
def backup(place: Place, tmp_path: Path) -> Path:
    back_up(place, tmp_path / "backup")
    return tmp_path / "backup"


def test_a_sound_backup(place: Place, backup: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in backup.rglob("*")}
    made, report = verify_backup(backup, place.kit, deep=True)
    assert made is not None
    assert (made.runs, report.findings, report.deep) == (2, (), True)
    assert (report.runs, report.events, report.audit_records) == (2, made.events, 5)
    assert {path: path.stat().st_mtime_ns for path in backup.rglob("*")} == before
    assert is_backup(backup)
    assert not is_backup(place.kit.folder)


def test_a_damaged_backup(place: Place, backup: Path) -> None:
    path = next((backup / "blobs").iterdir())
    path.unlink()
    path.write_bytes(b"other bytes")
    made, report = verify_backup(backup, place.kit)
    assert made is None
    assert f"whole backup: {path} was changed or damaged; take another backup" in str(
        report.problems[0]
    )
    (backup / MANIFEST).write_text("{}")
    assert "does not fit its text" in str(verify_backup(backup, place.kit)[1].problems[0])


def test_a_backup_of_a_damaged_state(place: Place, tmp_path: Path) -> None:
    lost = place.blobs.digests()[0]
    place.blobs.file(lost).unlink()
    back_up(place, tmp_path / "backup", damaged=True)
    made, report = verify_backup(tmp_path / "backup", place.kit)
    assert made is not None
    told, found = map(str, report.problems)
    assert told.startswith("manifest.json: whole backup: the state had 1 problem, the first: blob")
    assert found.startswith(f"blob {lost}: blob is there: it is missing, run ")


def test_others_can_read_a_backup(place: Place, backup: Path) -> None:
    backup.chmod(0o755)
    (found,) = verify_backup(backup, place.kit)[1].problems
    assert "rights: mode 0755 lets others in" in str(found)


def test_what_is_no_backup_of_this_server(place: Place, backup: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no backup"):
        verify_backup(place.kit.folder, place.kit)
    other = provision(tmp_path, ("a",), project="other").open("server")
    made, report = verify_backup(backup, other)
    assert (made, len(report.problems)) == (None, 1)
