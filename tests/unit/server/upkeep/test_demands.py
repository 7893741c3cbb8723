"""What a restore refuses before it changes anything, and what to do about it."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flplatform.core.errors import (
    ConfigError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from flplatform.server.upkeep import demands
from flplatform.server.upkeep import restore as restoring
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.building import BUILDING
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.unfinished import MARKER
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.state import SqlStateStore
from tests.support.postgres import Cluster
from tests.unit.server.upkeep.test_restore import backup, files_in, set_local  # noqa: F401
from tests.unit.server.upkeep.test_unfinished import go_on, rows

COPYING = "copying blobs and files"


def refused(
    backup: Path,  # noqa: F811
    place: Place, around: Path, kind: type[BaseException], text: str, *, damaged: bool = False
) -> None:  # fmt: skip
    """Restore; it must be refused before the work begins, and nothing be changed."""
    before, steps = files_in(around), list[str]()
    with pytest.raises(kind, match=text):
        restore(backup, place, move_aside=True, damaged=damaged, progress=steps.append)
    assert COPYING not in steps
    assert files_in(around) == before
    assert not (place.kit.folder / MARKER).exists()


# ---- the log of a server at work ----------------------------------------------------------------


@pytest.mark.parametrize("whose", ["kit", "backup"])
def test_the_log_that_another_kits_server_writes(place: Place, tmp_path: Path, whose: str) -> None:
    """As in a drill: a copy of the kit names the same file; or the backup's local files do."""
    path = tmp_path / "elsewhere" / "log.db"
    path.parent.mkdir()
    (place.folder / "events.db").rename(path)
    live = set_local(place.kit.folder, f"state_url: sqlite:///{path}\n")
    back_up(live, tmp_path / "backup")
    drill = shutil.copytree(live.kit.folder, tmp_path / "drill")
    shutil.rmtree(drill / "state")
    if whose == "backup":
        (drill / "local" / "resources.yml").unlink()
    with closing(SqlStateStore(live.target, lambda _error: None)):
        refused(
            tmp_path / "backup", Place.of(drill), tmp_path, FailedPreconditionError,
            rf"the event log {path} is in use by process {os.getpid()}.*; stop it first",
        )  # fmt: skip
    restore(tmp_path / "backup", Place.of(drill), move_aside=True)


def test_no_server_starts_on_a_log_that_is_being_restored(
    place: Place, backup: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    here = set_local(place.kit.folder, f"state_url: sqlite:///{tmp_path}/elsewhere/log.db\n")
    tried = []

    def start(text: str) -> None:
        if text == COPYING:
            with pytest.raises(FailedPreconditionError, match=r"in use by process \d+( |;)"):
                SqlStateStore(here.target, lambda _error: None)
            tried.append(text)

    restore(backup, here, move_aside=True, progress=start)
    assert tried
    SqlStateStore(here.target, lambda _error: None).close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("file/log.db", "state_url: .*/file/log.db cannot be written: .*; name another file"),
        ("folder", "state_url: .*/folder is a folder"),
        ("kit/state/log.db", "state_url: .*/state/log.db lies in the state folder"),
        ("backup/events.db", "state_url: .*/events.db is a file of the backup"),
    ],
)
def test_a_state_url_that_no_log_can_go_to(
    place: Place, backup: Path, tmp_path: Path, name: str, text: str  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    here = set_local(place.kit.folder, f"state_url: sqlite:///{tmp_path}/{name}\n")
    refused(backup, here, tmp_path, ConfigError, text)


def test_the_own_log_may_be_named_by_its_url(place: Place, backup: Path) -> None:  # noqa: F811
    here = set_local(place.kit.folder, f"state_url: sqlite:///{place.folder}/events.db\n")
    done = restore(backup, here, move_aside=True)
    assert done.log_aside is None
    assert rows(here.target) == rows(backup / "events.db")


# ---- what PostgreSQL does not take --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("DELETE FROM events WHERE stream='run/1' AND seq=4", "run/1#4 is missing"),
        ("DELETE FROM events WHERE stream='run/1' AND seq=1", "run/1#1 is missing"),
        (
            "UPDATE events SET body=X'80ff' WHERE stream='run/1' AND seq=4",
            "run/1#4 is damaged: body is stored as blob",
        ),
        (
            "UPDATE events SET body=body||char(0) WHERE stream='run/1' AND seq=4",
            "run/1#4 holds a NUL character",
        ),
        (
            "UPDATE events SET version=3000000000 WHERE stream='run/1' AND seq=4",
            "run/1#4 has a version that is no 32-bit number",
        ),
    ],
)
def test_a_log_with_holes_and_a_database(
    place: Place, postgres: Cluster, tmp_path: Path, sql: Callable[..., None],
    change: str, what: str,
) -> None:  # fmt: skip
    sql(change)
    back_up(place, tmp_path / "damaged", damaged=True)
    here = set_local(place.kit.folder, f'state_url: "{postgres.url(postgres.new_schema())}"\n')
    text = f"PostgreSQL takes no such log: {what}.*take state_url out of local/resources.yml"
    refused(tmp_path / "damaged", here, tmp_path, FailedPreconditionError, text, damaged=True)
    there = set_local(place.kit.folder, "log_files: 2\n")
    restore(tmp_path / "damaged", there, move_aside=True, damaged=True)
    assert (
        demands.streams_of(there.target)[1] == demands.streams_of(tmp_path / "damaged/events.db")[1]
    )


# ---- a backup that is in the way ----------------------------------------------------------------


@pytest.mark.parametrize("folder", ["state", f"state{BUILDING}"])
def test_a_backup_that_the_restore_would_rename(
    place: Place, backup: Path, folder: str  # noqa: F811
) -> None:  # fmt: skip
    inside = place.kit.folder / folder / "b"
    shutil.copytree(backup, inside)
    refused(inside, place, place.kit.folder, InvalidArgumentError, "lies in .*; move it elsewhere")


# ---- a state folder that is somewhere else ------------------------------------------------------


@pytest.fixture
def disk(place: Place, tmp_path: Path) -> Path:
    """Where the state folder is meant to be."""
    folder = tmp_path / "disk" / "of-the-server"
    folder.parent.mkdir()
    place.folder.rename(folder)
    place.folder.symlink_to(folder)
    return folder


@pytest.mark.parametrize("left", ["full", "empty", "by URL"])
def test_a_link_to_the_state_stays(
    place: Place, backup: Path, disk: Path, left: str  # noqa: F811
) -> None:  # fmt: skip
    go_on(place)
    former = rows(place.target)
    if left == "empty":
        shutil.rmtree(disk)
        disk.mkdir()
    if left == "by URL":
        place = set_local(place.kit.folder, f"state_url: sqlite:///{place.folder}/events.db\n")
    done = restore(backup, place, move_aside=left != "empty")
    assert place.folder.readlink() == disk
    assert rows(disk / "events.db") == rows(backup / "events.db")
    assert (done.aside is None) == (left == "empty")
    if done.aside:
        assert done.aside.parent == disk.parent
        assert rows(done.aside / "events.db") == former
    kit = place.kit.folder
    assert not [*kit.glob(f"*{BUILDING}"), *kit.glob("*.before-*")]
    assert not verify_state(place, deep=True).problems


def test_a_restore_through_a_link_that_did_not_end(
    place: Place, backup: Path, disk: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == disk:
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            restore(backup, place, move_aside=True)
    assert not disk.exists()
    assert restore(backup, place).aside
    assert rows(disk / "events.db") == rows(backup / "events.db")


def test_a_link_to_a_disk_that_is_away(place: Place, backup: Path, disk: Path) -> None:  # noqa: F811
    disk.rename(disk.with_name("away"))
    refused(
        backup, place, disk.parent, FailedPreconditionError,
        f"state is a link to {disk}, which is not there; mount its disk, or remove the link",
    )  # fmt: skip
    assert [path.name for path in disk.parent.iterdir()] == ["away"]


def test_room_is_looked_for_where_the_link_leads(
    place: Place, backup: Path, disk: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    looked = []
    usage = shutil.disk_usage

    def note(folder: Path) -> object:
        looked.append(folder)
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", note)
    restore(backup, place, move_aside=True)
    assert looked == [disk.parent]


@pytest.mark.parametrize(
    ("what", "advice"),
    [("state", "a link to a folder on a disk"), ("log.db", "in a folder of that disk")],
)
def test_a_mount_point(
    place: Place, backup: Path, tmp_path: Path, what: str, advice: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if what == "log.db":
        place = set_local(place.kit.folder, f"state_url: sqlite:///{tmp_path}/elsewhere/log.db\n")
        (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == what)
    refused(
        backup, place, tmp_path, FailedPreconditionError,
        f"{what} is a mount point and cannot be renamed; .*{advice}",
    )  # fmt: skip


# ---- what killed restores have left -------------------------------------------------------------


def test_what_a_killed_restore_has_left_goes(place: Place, backup: Path) -> None:  # noqa: F811
    kit = place.kit.folder
    left = (
        kit / f"state{BUILDING}" / "half",
        kit / f"{BUILDING}-local" / "local" / "resources.yml",
        kit / f".tmp-0123456789abcdef-{MARKER}",
        kit / "local" / ".tmp-0123456789abcdef-resources.yml",
    )
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("state_url: with a password")
    restore(backup, place, move_aside=True)
    assert not [path for path in left if path.exists()]
    assert not (kit / f"{BUILDING}-local").exists()


# ---- while one is at work -----------------------------------------------------------------------


def test_a_restore_that_is_at_work_did_not_fail(
    place: Place, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    fill, told = restoring._fill_log, []

    def look(*given: object) -> None:
        told.extend(each.text for each in verify_state(Place.of(place.kit.folder)).problems)
        with pytest.raises(FailedPreconditionError, match="is at work in .*wait until it has"):
            back_up(place, tmp_path / "another")
        fill(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring, "_fill_log", look)
    restore(backup, place, move_aside=True)
    assert [text for text in told if "a restore of" in text and "is at work" in text]
    assert not [text for text in told if "did not end" in text]
