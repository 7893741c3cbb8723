"""A restore that cannot be done leaves everything as it was; one that is done is where it is read.

Kills at every step stand in `test_unfinished`.
"""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flplatform.core.errors import ConfigError, DataLossError, FLError, ResourceExhaustedError
from flplatform.security.audit import records
from flplatform.server.upkeep import building
from flplatform.server.upkeep import restore as restoring
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.unfinished import MARKER, demand_finished
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import snapshot
from tests.support.postgres import Cluster
from tests.unit.server.upkeep.test_unfinished import go_on, rows


@pytest.fixture
def backup(place: Place, tmp_path: Path) -> Path:
    back_up(place, tmp_path / "backup", link=False)
    return tmp_path / "backup"


def set_local(kit: Path, text: str) -> Place:
    (kit / "local" / "resources.yml").write_text(text)
    return Place.of(kit)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


# ---- where the log goes -------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [True, False])
def test_the_log_goes_where_the_restored_files_have_it(
    place: Place, tmp_path: Path, lost: bool
) -> None:
    """On a new machine: `--with-local`, or a kit without `resources.yml`."""
    kit, path = place.kit.folder, tmp_path / "elsewhere" / "log.db"
    set_local(kit, f"state_url: sqlite:///{path}\n")
    path.parent.mkdir()
    (place.folder / "events.db").rename(path)
    back_up(Place.of(kit), tmp_path / "backup")
    known = rows(path)
    shutil.rmtree(place.folder)
    shutil.rmtree(path.parent)
    here = set_local(kit, "log_files: 2\n")
    if lost:
        (kit / "local" / "resources.yml").unlink()
        here = Place.of(kit)
    done = restore(tmp_path / "backup", here, with_local=not lost)
    assert (done.log, done.took_url) == (str(path), True)
    assert not (place.folder / "events.db").exists()
    assert rows(Place.of(kit).target) == known
    assert not verify_state(Place.of(kit), deep=True).problems


def test_the_log_stays_where_the_kit_has_it(place: Place, backup: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "log.db"
    done = restore(backup, set_local(place.kit.folder, f"state_url: sqlite:///{path}\n"),
                   move_aside=True)  # fmt: skip
    assert (done.log, done.took_url) == (str(path), False)
    assert not verify_state(Place.of(place.kit.folder)).problems


def test_local_files_that_the_server_refuses(place: Place, tmp_path: Path) -> None:
    kit = place.kit.folder
    (kit / "local" / "policy.yml").write_text("of_a_newer_release: 1\n")
    back_up(place, tmp_path / "backup")
    (kit / "local" / "policy.yml").write_text("")
    before = files_in(kit)
    with pytest.raises(ConfigError, match="of_a_newer_release"):
        restore(tmp_path / "backup", place, move_aside=True, with_local=True)
    assert files_in(kit) == before


def test_it_is_read_again_before_it_is_done(
    place: Place, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "elsewhere" / "log.db"
    here = set_local(place.kit.folder, f"state_url: sqlite:///{path}\n")

    def damage(source: Path, target: Path) -> None:
        os.replace(source, target)
        with closing(sqlite3.connect(target)) as database:
            database.execute("DELETE FROM events WHERE stream = 'run/1'")
            database.commit()

    with monkeypatch.context() as patched:
        patched.setattr(restoring, "replace_durably", damage)
        with pytest.raises(DataLossError, match="log.db does not hold the events of"):
            restore(backup, here, move_aside=True)
    with pytest.raises(ConfigError, match="a restore did not end"):
        demand_finished(here.kit)
    restore(backup, here)
    assert not verify_state(here, deep=True).problems


# ---- what cannot be done ------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Usage(NamedTuple):
    free: int


def no_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(building.shutil, "disk_usage", lambda _folder: Usage(1000))


def full_while_copying(patch: pytest.MonkeyPatch) -> None:
    copy, left = building.copy_file, [4]

    def some(source: Path, target: Path) -> None:
        left[0] -= 1
        copy(source, target) if left[0] else full()

    patch.setattr(building, "copy_file", some)


def full_audit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(building.AuditLog, "record", full)


def full_for_the_marker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restoring.Unfinished, "begin", full)


def rename_fails(at: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The first rename takes the former state away, the second one puts the new one there."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        real, left = os.rename, [at]

        def rename(*names: Any) -> None:
            left[0] -= any(str(name).endswith("/state") for name in names)
            if not left[0]:
                left[0] -= 1
                raise OSError(errno.EBUSY, "Device or resource busy")
            real(*names)

        patch.setattr(os, "rename", rename)

    return spoil


def interrupted(patch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt("^C")

    patch.setattr(restoring, "_swap", stop)


@pytest.mark.parametrize("layout", ["inside", "elsewhere"])
@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (no_room, ResourceExhaustedError, r"\d{7,} bytes are needed on the disk of .*, 1000 are"),
        (full_while_copying, ResourceExhaustedError, "the disk is full: .*nothing was changed"),
        (full_audit, ResourceExhaustedError, "the disk is full: .*nothing was changed"),
        (full_for_the_marker, ResourceExhaustedError, "the disk is full: .*nothing was changed"),
        (rename_fails(1), OSError, "busy"),
        (rename_fails(2), OSError, "busy"),
        (interrupted, KeyboardInterrupt, "C"),
    ],
)
def test_what_fails_before_the_swap_changes_nothing(
    place: Place, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    layout: str, spoil: Callable[[pytest.MonkeyPatch], None], kind: type[BaseException], text: str,
) -> None:  # fmt: skip
    if layout == "elsewhere":
        path = tmp_path / "elsewhere" / "log.db"
        path.parent.mkdir()
        (place.folder / "events.db").rename(path)
        place = set_local(place.kit.folder, f"state_url: sqlite:///{path}\n")
    go_on(place)
    before = files_in(tmp_path)
    with monkeypatch.context() as patched:
        spoil(patched)
        with pytest.raises(kind, match=text):
            restore(backup, place, move_aside=True)
    assert files_in(tmp_path) == before
    demand_finished(place.kit)
    assert not (place.kit.folder / f"state{building.BUILDING}").exists()
    restore(backup, place, move_aside=True)
    assert rows(place.target) == rows(backup / "events.db")


def test_a_state_that_cannot_be_put_back_stays_marked(
    place: Place, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(target).endswith("/state"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="Input/output"):
            restore(backup, place, move_aside=True)
    with pytest.raises(ConfigError, match="a restore did not end"):
        demand_finished(place.kit)
    done = restore(backup, place)
    assert done.aside is not None
    assert not verify_state(place).problems


def test_a_database_that_cannot_be_written(
    place: Place, backup: Path, postgres: Cluster, tmp_path: Path
) -> None:
    schema = postgres.new_schema()
    postgres.execute("CREATE ROLE reader LOGIN")
    postgres.execute(f"GRANT USAGE ON SCHEMA {schema} TO reader")
    here = set_local(place.kit.folder, f'state_url: "{postgres.url(schema, user="reader")}"\n')
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match="permission denied.*names the permissions"):
        restore(backup, here, move_aside=True)
    assert files_in(tmp_path) == before
    postgres.execute(f"GRANT CREATE ON SCHEMA {schema} TO reader")
    with pytest.MonkeyPatch.context() as patched:  # the trial itself leaves nothing
        patched.setattr(restoring, "building", full)
        with pytest.raises(OSError, match="No space"):
            restore(backup, here, move_aside=True)
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = "
    assert postgres.execute(f"{tables}'{schema}'") == [(0,)]
    restore(backup, here, move_aside=True)
    assert not verify_state(here, deep=True).problems


def test_an_audit_that_was_cut(place: Place, tmp_path: Path) -> None:
    path = place.folder / "audit.jsonl"
    cut = "".join(path.read_text().splitlines(keepends=True)[:-2])
    path.write_text(cut)
    back_up(place, tmp_path / "backup", damaged=True)
    before = files_in(place.kit.folder)
    with pytest.MonkeyPatch.context() as patched:
        real = restoring.build
        patched.setattr(restoring, "build", lambda *given: real(*given[:-1], False))
        with pytest.raises(DataLossError, match="audit.jsonl: ends with record 3, but record 5"):
            restore(tmp_path / "backup", place, move_aside=True, damaged=True)
    assert files_in(place.kit.folder) == before
    restore(tmp_path / "backup", place, move_aside=True, damaged=True)
    (aside,) = place.folder.glob("audit-damaged-*")
    assert (aside / "audit.jsonl").read_text() == cut
    (record,) = records(path)
    assert (record["action"], record["details"]["audit of before"]) == ("state.restore", aside.name)
    assert not verify_state(place).problems


# ---- what is told -------------------------------------------------------------------------------


def test_a_log_that_is_moved_aside_keeps_what_was_not_written_back(
    place: Place, backup: Path, tmp_path: Path
) -> None:
    """As after a kill: the last events are in the write-ahead log alone."""
    path = tmp_path / "elsewhere" / "log.db"
    path.parent.mkdir()
    source = place.folder / "events.db"
    with closing(sqlite3.connect(source)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA wal_autocheckpoint=0")
        database.execute("DELETE FROM events WHERE stream = 'run/2' AND seq > 3")
        database.commit()
        for end in ("", "-wal"):
            shutil.copy(f"{source}{end}", f"{path}{end}")
    here = set_local(place.kit.folder, f"state_url: sqlite:///{path}\n")
    done = restore(backup, here, move_aside=True)
    assert done.log_aside is not None
    assert done.log_aside.name.startswith("log.db.before-2")
    assert Path(f"{done.log_aside}-wal").exists()
    with snapshot(done.log_aside) as log:
        assert len(log.read("run/2")) == 3
    assert len(rows(path)) > len(rows(done.log_aside))


def test_what_is_left_of_a_lost_log_is_not_taken_for_the_new_ones(
    place: Place, backup: Path, tmp_path: Path
) -> None:
    path = tmp_path / "elsewhere" / "log.db"
    path.parent.mkdir()
    Path(f"{path}-wal").write_bytes(b"of another file")
    here = set_local(place.kit.folder, f"state_url: sqlite:///{path}\n")
    shutil.rmtree(place.folder)
    with pytest.raises(FLError, match="there is an event log"):
        restore(backup, here)
    restore(backup, here, move_aside=True)
    assert rows(path) == rows(backup / "events.db")
    (aside,) = path.parent.glob("log.db.before-*")
    assert aside.read_bytes() == b"of another file"


def test_runs_that_go_on_are_named(place: Place, backup: Path) -> None:
    assert restore(backup, place, move_aside=True).unended == (2,)
    assert not (place.kit.folder / MARKER).exists()
