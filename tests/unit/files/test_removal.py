"""Whatever lies in a folder, it can be deleted, and nothing beside it is."""

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flplatform.files import removal
from flplatform.files.removal import empty, remove

ROOT = Path(__file__).parents[3]
DEPTH = 1200
"""Folders within one another: more than the stack has frames, and a path has bytes."""

AS_OWNER = """
import os, sys
from pathlib import Path
from flplatform.files.removal import remove

if os.geteuid() == 0:  # who may do everything
    os.setgid(65534)
    os.setuid(65534)
inner = Path(sys.argv[1]) / "top" / "middle" / "inner"
inner.mkdir(parents=True)
for folder in (inner, inner.parent, inner.parent.parent):
    (folder / "file").touch()
(inner / "link").symlink_to(sys.argv[2])
modes = [int(mode, 8) for mode in sys.argv[3:]]
for folder, mode in zip((inner, inner.parent, inner.parent.parent), modes):
    folder.chmod(mode)
remove(inner.parent.parent)
"""


def dig(folder: Path, depth: int) -> None:
    """Make folders within one another, each with a file beside the next."""
    handle = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=handle)
        os.close(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=handle))
        inner = os.open("deep", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)


def test_files_folders_and_links_are_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(0o755)
    (kept / "file").write_text("x")
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("12345")
    (folder / "a" / "same").hardlink_to(kept / "file")
    (folder / "to a folder").symlink_to(kept)
    (folder / "a" / "to a file").symlink_to(kept / "file")
    os.mkfifo(folder / "a" / "b" / "pipe")
    assert empty(folder) == 6
    assert list(folder.iterdir()) == []
    remove(folder)
    (tmp_path / "link").symlink_to(kept)
    remove(tmp_path / "link")
    (tmp_path / "file").touch()
    remove(tmp_path / "file")
    remove(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept / "file").read_text() == "x"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o755


def test_depth_takes_neither_stack_nor_descriptors(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    dig(tmp_path / "deep", DEPTH)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(tmp_path, os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 8, limits[1]))
    try:
        remove(tmp_path / "deep")
        assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)  # pytest could not


@pytest.mark.parametrize(
    "modes", [("500", "500", "500"), ("0", "0", "0"), ("700", "300", "400")], ids=str
)
def test_rights_that_the_owner_has_taken_from_himself(modes: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place, kept = Path(name) / "place", Path(name) / "kept"
        for folder in (place, kept):
            folder.mkdir()
            if os.geteuid() == 0:
                os.chown(folder, 65534, 65534)
        kept.chmod(0o500)
        Path(name).chmod(0o755)
        command = [sys.executable, "-c", AS_OWNER, str(place), str(kept), *modes]
        subprocess.run(command, check=True, cwd=ROOT, timeout=60)
        assert list(place.iterdir()) == []
        assert stat.S_IMODE(kept.stat().st_mode) == 0o500


def test_what_cannot_be_deleted_keeps_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "file").touch()
    unlink, refused = os.unlink, []

    def refusing_one(name: str, **options: int) -> None:
        if not refused:
            refused.append(name)
            raise PermissionError(1, "Operation not permitted")
        unlink(name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing_one)
        with pytest.raises(PermissionError):
            remove(tmp_path / "folder")
    assert len(list((tmp_path / "folder").iterdir())) == 1
    shutil.rmtree(tmp_path / "folder")


def test_a_folder_that_is_moved_away_meanwhile_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "a" / "b").mkdir(parents=True)
    (tmp_path / "other" / "b").mkdir(parents=True)
    identity, looked = removal._identity, []

    def moving(folder: int) -> tuple[int, int]:
        looked.append(folder)
        if len(looked) == 3:  # it is in the innermost
            (tmp_path / "folder" / "a" / "b").rename(tmp_path / "other" / "moved")
        return identity(folder)

    monkeypatch.setattr(removal, "_identity", moving)
    with pytest.raises(OSError, match="moved"):
        remove(tmp_path / "folder")
    assert (tmp_path / "other" / "b").exists()
