"""The exchange folders, with whatever a job's code may put into them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flplatform.client import box as module
from flplatform.client.box import Box, copy_folder
from flplatform.core.errors import InvalidArgumentError, ResourceExhaustedError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path / "run")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_prepare_offers_the_model_and_a_copy_of_the_state(box, tmp_path):
    model, state = tmp_path / "model", tmp_path / "state"
    model.write_bytes(b"weights")
    (state / "deep").mkdir(parents=True)
    (state / "deep" / "tool").write_text("#!")
    (state / "deep" / "tool").chmod(0o755)
    (state / "link").symlink_to("/nowhere")
    (box.box / "leftover").mkdir()
    box.prepare(model, state, 100)
    assert (box.inbox / "model.safetensors").samefile(model)
    copy = box.box / "state"
    assert (copy / "deep" / "tool").stat().st_mode & 0o777 == 0o700
    assert not (copy / "deep" / "tool").samefile(state / "deep" / "tool")
    assert os.readlink(copy / "link") == "/nowhere"
    assert list(box.box.iterdir()) == [copy]
    box.prepare(None, None, 100)
    assert list(box.inbox.iterdir()) == []
    assert list(copy.iterdir()) == []


def test_a_model_on_another_file_system_is_copied(box, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.write_bytes(b"weights")

    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    box.prepare(model, None, 100)
    assert (box.inbox / "model.safetensors").read_bytes() == b"weights"


def test_collect_copies(box, work):
    box.prepare(None, None, 100)
    (box.box / "result.safetensors").write_bytes(b"weights")
    (box.box / "state" / "counter").write_text("1")
    box.collect_model(work / "model", 7)
    box.collect_state(work / "state", 1)
    (box.box / "result.safetensors").write_bytes(b"other")
    box.clear()
    assert (work / "model").read_bytes() == b"weights"
    assert (work / "state" / "counter").read_text() == "1"


def fifo(path):
    os.mkfifo(path)


def bound(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


ODD = {
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "fifo": fifo,
    "socket": bound,
    "folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_results_are_refused(box, work, odd):
    ODD[odd](box.box / "result.safetensors")
    with pytest.raises(InvalidArgumentError, match="result.safetensors"):
        box.collect_model(work / "model", 1 << 30)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("odd", ["fifo", "socket"])
def test_odd_state_is_refused(box, work, odd):
    box.prepare(None, None, 100)
    ODD[odd](box.box / "state" / "odd")
    with pytest.raises(InvalidArgumentError, match="odd"):
        box.collect_state(work / "state", 1 << 30)


def test_state_that_is_a_link_is_refused(box, work):
    box.prepare(None, None, 100)
    shutil.rmtree(box.box / "state")
    (box.box / "state").symlink_to("/etc")
    with pytest.raises(InvalidArgumentError, match="state"):
        box.collect_state(work / "state", 1 << 30)


def test_sizes_are_bounded_before_anything_is_copied(box, work, monkeypatch):
    box.prepare(None, None, 100)
    with (box.box / "result.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ResourceExhaustedError, match="the model is larger"):
        box.collect_model(work / "model", 1 << 30)
    for name in "abc":
        (box.box / "state" / name).write_text("12345")
    with pytest.raises(ResourceExhaustedError, match="the state is larger than 14 bytes"):
        box.collect_state(work / "state", 14)
    monkeypatch.setattr(module, "MAX_FILES", 2)
    shutil.rmtree(work / "state")
    with pytest.raises(ResourceExhaustedError, match="more than 2 files"):
        box.collect_state(work / "state", 1000)


def test_depth_is_bounded(tmp_path):
    deep = tmp_path / "deep" / "/".join("d" * 70)
    deep.mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    with pytest.raises(InvalidArgumentError, match="deeper than 64"):
        copy_folder(tmp_path / "deep", tmp_path / "copy", 100)


def test_copying_between_file_systems(box, work, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    (box.box / "result.safetensors").write_bytes(b"w" * 100_000)
    box.collect_model(work / "model", 100_000)
    assert (work / "model").read_bytes() == b"w" * 100_000


AS_OWNER = """
import os, sys
from pathlib import Path
from flplatform.client.box import Box

if os.geteuid() == 0:  # who may do everything
    os.setgid(65534)
    os.setuid(65534)
box = Box(Path(sys.argv[1]))
cache = box.box / "state" / "cache"
cache.mkdir(parents=True)
(cache / "big").write_bytes(bytes(1000))
(cache / "link").symlink_to(Path(sys.argv[2]) / "x")
cache.chmod(0o500)
box.box.chmod(0)
assert box.clear() == 1000
assert list(box.box.iterdir()) == []
"""


def test_the_box_is_emptied_whatever_rights_the_code_has_left():
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place, locked = Path(name) / "place", Path(name) / "locked"
        place.mkdir()
        locked.mkdir(0)  # what lies below it may not be looked at
        Path(name).chmod(0o755)
        if os.geteuid() == 0:
            os.chown(place, 65534, 65534)
        command = [sys.executable, "-c", AS_OWNER, str(place), str(locked)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=60)
        locked.chmod(0o700)


def test_the_box_is_emptied_however_deep_its_folders_are(box):
    handle = os.open(box.box, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(handle)
    try:
        assert box.clear() == 0
        assert list(box.box.iterdir()) == []
    finally:
        subprocess.run(["rm", "-rf", box.box], check=True)  # pytest could not
