"""A restore that is killed at any of its steps: the old state, the new one, or no server at all."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import ConfigError, FailedPreconditionError, FLError
from flplatform.server.upkeep import restore as restoring
from flplatform.server.upkeep.backup import back_up
from flplatform.server.upkeep.place import Place
from flplatform.server.upkeep.restore import restore
from flplatform.server.upkeep.unfinished import MARKER, demand_finished
from flplatform.server.upkeep.verify import verify_state
from flplatform.store.snapshot import snapshot
from flplatform.store.state import SqlStateStore

STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "fdatasync")
"""All that changes what the kit is like for the next process."""
CHANGES = "putting the state in its place"
REPEAT = r"a restore did not end \(see .*/restoring.json\); run it again: fl_state restore "


def rows(target: str | Path) -> list[Any]:
    with snapshot(target) as log:
        return [row for stream in log.streams() for row in log.read(stream)]


def go_on(place: Place) -> None:
    """Let the state be another one than that of the backup."""
    with closing(SqlStateStore(place.target, lambda _error: None)) as store:
        last = store.read(ev.FEDERATION)[-1]
        event = ev.encode(ev.RunDeleted(run=1, by="lead"))
        store.append([type(last)(last.stream, last.seq + 1, last.time, *event)]).result()


def elsewhere(kit: Path) -> Place:
    """Keep the log outside of the state folder."""
    path = kit.parent / "elsewhere" / "log.db"
    (kit / "local" / "resources.yml").write_text(f"state_url: sqlite:///{path}\n")
    if (kit / "state" / "events.db").exists():
        path.parent.mkdir()
        (kit / "state" / "events.db").rename(path)
    return Place.of(kit)


def with_state(kit: Path) -> Place:
    return Place.of(kit)


def linked(kit: Path) -> Place:
    """Keep the state on another disk."""
    folder = kit.parent / "disk" / "state"
    folder.parent.mkdir()
    (kit / "state").rename(folder)
    (kit / "state").symlink_to(folder)
    return Place.of(kit)


def elsewhere_without_state(kit: Path) -> Place:
    shutil.rmtree(kit / "state")
    return elsewhere(kit)


def killed(at: int, backup: Path, place: Place, *, move_aside: bool = False) -> bool:
    """Restore in a process that is killed before its `at`-th step; return whether it was."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        left = [0]

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return called

        def progress(text: str) -> None:
            if text == CHANGES:  # before this there is a folder of its own, and nothing else
                left[0] = at

        for name in STEPS:
            setattr(os, name, counting(getattr(os, name)))
        restore(backup, place, move_aside=move_aside, progress=progress)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.fixture
def kits(kit: Path, tmp_path: Path) -> Iterator[Path]:
    """The same kit again and again."""

    def copies() -> Iterator[Path]:
        number = 0
        while True:
            number += 1
            yield shutil.copytree(kit, tmp_path / str(number) / "kit")
            shutil.rmtree(tmp_path / str(number))

    return copies()


@pytest.mark.parametrize("layout", [with_state, linked, elsewhere, elsewhere_without_state])
def test_killed_at_every_step(
    kit: Path, kits: Iterator[Path], tmp_path: Path, layout: Callable[[Path], Place]
) -> None:
    backup = tmp_path / "backup"
    back_up(Place.of(kit), backup)
    new = rows(backup / "events.db")
    unfinished, at = 0, 0
    while True:
        at += 1
        place = layout(next(kits))
        old: list[Any] = []
        if place.folder.exists():
            go_on(place)
            old = rows(place.target)
        if not killed(at, backup, place, move_aside=True):
            break
        if not (place.kit.folder / MARKER).exists():
            found = rows(place.target) if place.folder.exists() else []
            assert found in (old, new)
            assert not found or not verify_state(place).problems
            continue
        unfinished += 1
        with pytest.raises(ConfigError, match=REPEAT + str(backup)):
            demand_finished(place.kit)
        assert any("a restore did not end" in each.text for each in verify_state(place).problems)
        place.folder.resolve().mkdir(exist_ok=True)  # as a server does before it is refused
        if layout is with_state:
            killed(at, backup, place)  # the one that was to end it, too
        done = restore(backup, place) if (place.kit.folder / MARKER).exists() else None
        demand_finished(place.kit)
        assert rows(place.target) == new
        assert not verify_state(place, deep=True).problems
        before = [*place.folder.resolve().parent.glob("state.before-*")]
        assert len(before) == bool(old), "the former state is there, once"
        if old and layout in (with_state, linked):
            assert rows(before[0] / "events.db") == old
        if old and layout is elsewhere:
            (former,) = (place.kit.folder.parent / "elsewhere").glob("log.db.before-*Z")
            assert rows(former) == old
        if done:
            assert done.aside == (before[0] if old else None)
    assert unfinished >= 5
    assert rows(place.target) == new


def test_another_backup_may_end_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(place, tmp_path / "one")
    go_on(place)
    back_up(place, tmp_path / "two")

    def full(*_: object) -> None:
        raise OSError(28, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(restoring, "_demand_restored", full)
        with pytest.raises(OSError, match="no space"):
            restore(tmp_path / "one", place, move_aside=True)
    with pytest.raises(FailedPreconditionError, match=REPEAT):
        back_up(place, tmp_path / "no")
    done = restore(tmp_path / "two", place)
    assert rows(place.target) == rows(tmp_path / "two" / "events.db")
    assert done.aside is not None
    (half,) = done.half
    assert rows(half / "events.db") == rows(tmp_path / "one" / "events.db")


@pytest.mark.parametrize("spoil", ["{", "{}", None])
def test_a_damaged_marker(place: Place, tmp_path: Path, spoil: str | None) -> None:
    """It says what to do, hides nothing else, and what it says helps."""
    back_up(place, tmp_path / "backup")
    go_on(place)
    former, marker = rows(place.target), place.kit.folder / MARKER
    marker.mkdir() if spoil is None else marker.write_text(spoil)
    advice = f"did not end, and .*{MARKER}.*; remove it, then run .* --move-aside"
    for refused in (
        lambda: demand_finished(place.kit),
        lambda: back_up(place, tmp_path / "no"),
        lambda: restore(tmp_path / "backup", place, move_aside=True),
    ):
        with pytest.raises(FLError, match=advice):
            refused()
    (place.folder / "users.json").write_text("{")
    report = verify_state(place)
    assert [each.where for each in report.problems] == [MARKER, "state/users.json"]
    assert report.events == len(former)
    assert re.search(advice, report.problems[0].text)
    marker.rmdir() if spoil is None else marker.unlink()
    done = restore(tmp_path / "backup", place, move_aside=True)
    assert done.aside is not None
    assert rows(done.aside / "events.db") == former
