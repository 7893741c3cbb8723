"""Isolation: what the mounts promise. What a job can reach is in test_executors."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flplatform.client import sandbox
from flplatform.client.sandbox import (
    NONE,
    Level,
    Mounts,
    available_level,
    command,
    environment,
    interpreter_folders,
    make_scratch,
    seen_at,
    sweep_scratch,
)
from flplatform.core.config import Environment


@pytest.fixture
def folder(site_outside_tmp):
    return site_outside_tmp.folder


@pytest.fixture(params=["bubblewrap", "namespaces"])
def level(request):
    if problem := sandbox._probe(request.param):
        pytest.skip(f"{request.param}: {problem}")
    return Level("sandbox", request.param)


def run(level: Level, mounts: Mounts, script: str) -> str:
    argv = command(level, mounts, ["/bin/sh", "-c", script])
    result = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    return result.stdout + result.stderr


def test_deeper_paths_are_mounted_later(folder):
    kit, data = folder / "kit", folder / "kit" / "data"
    mounts = Mounts(folder, (folder, data, Path("/usr")), (kit / "state",), (kit,))
    placed = [(kind, target) for kind, _, target in sandbox._ordered(mounts)]
    assert placed == [
        ("write", "/tmp"),
        ("hide", "/run"),
        ("hide", str(kit)),
        ("read", str(data)),
        ("write", str(kit / "state")),
    ]


def test_what_is_hidden_beats_what_is_shown(folder, level):
    (folder / "scratch").mkdir()
    mounts = Mounts(folder / "scratch", (folder / "kit", folder), (), (folder / "kit",))
    assert run(level, mounts, f"ls {folder / 'kit'}; ls -d {folder}") == f"{folder}\n"


def test_what_is_shown_below_what_is_hidden(folder, level):
    scratch, table = folder / "scratch", folder / "kit" / "data" / "table.csv"
    scratch.mkdir()
    work = folder / "kit" / "state"
    mounts = Mounts(scratch, (table,), (work,), (folder / "kit",))
    script = f"cat {table}; echo; find {folder / 'kit'} -type f; touch {work}/new /tmp/mine; pwd"
    assert run(level, mounts, script).split() == ["1,2,3", str(table), "/tmp"]
    assert (work / "new").exists()
    assert (scratch / "mine").exists()


@pytest.mark.parametrize(
    ("script", "refusal"),
    [
        ("umount {kit}", "must be superuser|not permitted|not mounted|no mount point"),
        ("mount -t tmpfs none /mnt", "must be superuser|permission denied|not permitted"),
        ("mount -o remount,rw /", "must be superuser|permission denied|not permitted"),
        ("echo 1 > /proc/sys/kernel/sysrq", "nonexistent|Permission denied|Read-only"),
        ("echo x > /etc/hosts", "Read-only|Permission denied"),
        ("unshare -Urm umount {kit}", "."),
        ("kill -0 {parent}", "[Nn]o such process"),
        ("nsenter -t {parent} -m ls", "."),
    ],
)
def test_ways_out_that_are_closed(folder, level, script, refusal):
    (folder / "scratch").mkdir()
    kit = folder / "kit"
    mounts = Mounts(folder / "scratch", (), (), (kit,))
    text = script.format(kit=kit, parent=os.getpid())
    said = run(level, mounts, f"{text} || echo refused; ls -A {kit}")
    assert "refused" in said
    assert "startup" not in said
    assert re.search(refusal, said)


def test_loopback_is_there_and_nothing_else(folder, level):
    (folder / "scratch").mkdir()
    program = (
        "import socket; server = socket.create_server(('127.0.0.1', 0));"
        "socket.create_connection(server.getsockname()).close();"
        "print([name for _, name in socket.if_nameindex()])"
    )
    mounts = Mounts(folder / "scratch", interpreter_folders(sys.executable))
    argv = command(level, mounts, [sys.executable, "-c", program])
    assert subprocess.run(argv, capture_output=True, text=True).stdout == "['lo']\n"


def test_devices(folder, level):
    (folder / "scratch").mkdir()
    script = "echo x > /dev/null; head -c 1 /dev/zero | wc -c; echo > /dev/shm/x; ls /dev"
    said = run(level, Mounts(folder / "scratch"), script).split()
    assert said[0] == "1"
    assert {"null", "shm", "urandom"} <= set(said)
    assert not {"mem", "kmsg", "vda", "sda"} & set(said)


def test_available_level_tries_once():
    available_level.cache_clear()
    level = available_level()
    assert level is available_level()
    assert (level.name == "sandbox") == (level.tool != "")
    assert level.reason


def test_available_level_says_why_it_is_none(monkeypatch):
    available_level.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sandbox, "LAUNCHER", Path("/nowhere/launcher.py"))
    level = available_level()
    available_level.cache_clear()
    assert level.name == "none"
    assert level.reason.startswith("bubblewrap: not installed; namespaces: ")
    assert "/nowhere/launcher.py" in level.reason


def test_a_tool_that_hangs_is_none(monkeypatch):
    def hang(*_, **options):
        raise subprocess.TimeoutExpired("bwrap", options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert "timed out" in sandbox._probe("namespaces")


def test_scratch(tmp_path, monkeypatch):
    kit, long = tmp_path / "kit", tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = make_scratch(kit, 7)
    os.close(before.lock)  # as when its process dies
    scratch = make_scratch(kit, 7)
    assert list(tmp_path.glob("flp-*")) == [scratch.folder]
    assert scratch.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    short = make_scratch(kit, 7)
    assert short.folder.parent == Path("/tmp")
    assert list(long.iterdir()) == []
    short.close()
    assert not short.folder.exists()
    assert seen_at(NONE, scratch.folder) == scratch.folder
    assert seen_at(Level("sandbox", "bubblewrap"), scratch.folder) == Path("/tmp")
    scratch.close()


def test_only_what_the_dead_have_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kit, other = tmp_path / "kit", tmp_path / "other"
    places = [(kit, 7), (kit, 7), (kit, 77), (other, 7)]
    scratches = [make_scratch(*place) for place in places]
    made = [scratch.folder for scratch in scratches]
    for scratch in scratches[1:]:
        os.close(scratch.lock)
    (made[1] / "locked").mkdir(0o500)
    sweep_scratch(kit, 7)
    assert [folder.exists() for folder in made] == [True, False, True, True]
    sweep_scratch(kit)
    assert [folder.exists() for folder in made] == [True, False, False, True]
    sweep_scratch(other, 1)
    assert made[3].exists()
    scratches[0].close()


def test_a_place_that_cannot_be_listed_is_left_alone(tmp_path, monkeypatch, caplog):
    def none_left(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(sandbox, "sweep", none_left)
    sweep_scratch(tmp_path)
    assert "Too many open files" in caplog.text


def test_interpreter_folders(tmp_path):
    assert interpreter_folders(sys.executable) == (Path(sys.prefix), Path(sys.base_prefix))
    base, env = tmp_path / "base" / "bin", tmp_path / "env" / "bin"
    base.mkdir(parents=True)
    env.mkdir(parents=True)
    (base / "python").touch()
    (env / "python").symlink_to(base / "python")
    assert interpreter_folders(str(env / "python")) == (env.parent, base.parent)


def test_environment(monkeypatch):
    monkeypatch.setenv("FLP_PASSPHRASE", "s3cret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:s3cret@proxy")
    monkeypatch.setenv("LANG", "C.UTF-8")
    found = environment(Environment(gpus=(0, 2)), "/tmp", Path("/lib"))
    assert "s3cret" not in str(found)
    assert found["LANG"] == "C.UTF-8"
    assert found["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert (found["HOME"], found["TMPDIR"], found["PYTHONPATH"]) == ("/tmp", "/tmp", "/lib")
