"""Temporary folders end with their block, or with the next process that needs one."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flplatform.files import scratch
from flplatform.files.scratch import scratch_folder
from tests.unit.files.test_removal import DEPTH, dig

KILLED = """
import os, sys
from pathlib import Path
from flplatform.files.scratch import scratch_folder

with scratch_folder("fl-test-", Path(sys.argv[1])) as folder:
    (folder / "job").write_text("x")
    print(folder, flush=True)
    if sys.argv[2] == "stays":
        sys.stdin.read()
    os._exit(9)
"""


def other(place: Path, how: str) -> "subprocess.Popen[str]":
    """Start a process that makes a folder, and is killed or stays."""
    command = [sys.executable, "-c", KILLED, str(place), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: "subprocess.Popen[str]") -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def test_it_is_gone_after_the_block(tmp_path: Path) -> None:
    with scratch_folder("fl-test-", tmp_path) as folder:
        (folder / "file").write_text("x")
        assert folder.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


def test_what_the_dead_have_left_is_cleared_and_what_the_living_hold_is_not(
    tmp_path: Path,
) -> None:
    with other(tmp_path, "is killed") as dead:
        left = line_of(dead)
    with other(tmp_path, "stays") as living:
        kept = line_of(living)
        (tmp_path / "fl-test-file").touch()
        (tmp_path / "fl-test-link").symlink_to(left)
        with scratch_folder("fl-test-", tmp_path) as mine:
            assert sorted(tmp_path.iterdir()) == sorted(
                [kept, mine, tmp_path / "fl-test-file", tmp_path / "fl-test-link"]
            )
            assert (kept / "job").exists()
        living.kill()


def test_a_process_that_has_run_out_of_descriptors_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: Path) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(scratch, "enter", none_left)
    with pytest.raises(OSError, match="Too many"):
        scratch.open_scratch(tmp_path, "fl-test-")
    assert list(tmp_path.iterdir()) == []


def test_what_is_nested_deep_is_removed(tmp_path: Path) -> None:
    with scratch_folder("fl-test-", tmp_path) as folder:
        dig(folder, DEPTH)
    assert list(tmp_path.iterdir()) == []
    made = scratch.open_scratch(tmp_path, "fl-test-")
    dig(made.folder, DEPTH)
    os.close(made.lock)  # as at the end of its process
    scratch.sweep(tmp_path, "fl-test-*")
    assert list(tmp_path.iterdir()) == []
