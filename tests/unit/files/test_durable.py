"""Files that are whole or absent."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flplatform.core.errors import ConfigError
from flplatform.files import durable
from flplatform.files.durable import (
    check_private,
    private_dir,
    remove_temporaries,
    temporary_beside,
    write_atomic,
)


def test_content_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, (part for part in (b"n", b"e", b"w")))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_the_mode_holds_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    previous = os.umask(0o077)
    try:
        write_atomic(tmp_path / "file", b"", mode)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("gone")

    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError, match="gone"):
        write_atomic(path, chunks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_then_name_then_folder_become_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        folder = Path(f"/proc/self/fd/{handle}").resolve() == tmp_path.resolve()
        calls.append("folder" if folder else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    write_atomic(tmp_path / "file", b"data")
    assert calls == ["file", "rename", "folder"]


def test_a_failed_fsync_is_never_taken_for_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_handle: int) -> None:
        raise OSError("lost")

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="lost"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_temporaries_are_beside_unused_and_removable(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 60)
    one, other = temporary_beside(path), temporary_beside(path)
    assert one != other
    assert one.parent == tmp_path
    one.write_bytes(b"half")
    other.mkdir()
    (other / "file").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]


def test_a_new_folder_and_all_above_it_are_durable_and_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, list[str]]] = []
    real = durable.fsync_dir

    def sync(path: Path) -> None:
        synced.append((path, os.listdir(path)))
        real(path)

    monkeypatch.setattr(durable, "fsync_dir", sync)
    folder = private_dir(tmp_path / "a" / "b")
    assert synced == [(tmp_path, ["a"]), (tmp_path / "a", ["b"])]
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent)} == {0o700}
    synced.clear()
    private_dir(folder)
    assert synced == []


def test_private_folders_and_files(tmp_path: Path) -> None:
    folder = private_dir(private_dir(tmp_path / "a" / "b"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = folder / "secret"
    write_atomic(secret, b"key")
    check_private(secret)
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 0640: others may read it; run: chmod 600"):
        check_private(secret)


@pytest.mark.parametrize("link", [True, False])
def test_what_is_in_the_place_of_a_folder_is_named(tmp_path: Path, link: bool) -> None:
    path = tmp_path / "state"
    if link:
        path.symlink_to(tmp_path / "gone")
    else:
        path.touch()
    told = f"{path} is a link to {tmp_path / 'gone'}, which" if link else f"{path} is no folder"
    with pytest.raises(ConfigError, match=re.escape(told)):
        private_dir(path / "blobs")
