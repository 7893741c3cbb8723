"""fl_state on the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flplatform.core import events as ev
from flplatform.entrypoints.process import EXIT_CONFIG
from flplatform.entrypoints.state import app
from flplatform.server.upkeep.unfinished import Unfinished
from tests.unit.server.upkeep.conftest import _private, kit, made, place, sql  # noqa: F401


def fl_state(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_verify(kit: Path, sql) -> None:  # noqa: F811
    done = fl_state("verify", kit, "--deep")
    assert done.exit_code == 0
    assert done.stdout.startswith("no problem in 2 runs with ")
    (kit / "state" / "blobs" / ("f" * 64)).touch(0o444)
    sql("DELETE FROM events WHERE stream='run/1' AND seq=4")
    assert "blobs (every byte) and 5 audit records" in done.stdout
    done = fl_state("verify", kit)
    assert done.exit_code == 1
    assert "blobs (sizes only) and 5 audit records" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("PROBLEM  run/1 #4: I1 gapless stream: event 4 is missing; stop the")
    assert any(line.startswith("note  blob blake3:ffff") for line in lines)
    assert lines[-1].startswith("1 problem in 2 runs")
    found = json.loads(fl_state("verify", kit, "--json").stdout)
    assert [(each["where"], each["seq"]) for each in found["problems"]] == [("run/1", 4)]


def test_the_state_folder_stands_for_its_kit(kit: Path) -> None:  # noqa: F811
    assert fl_state("verify", kit / "state").stdout.startswith("no problem in 2 runs")
    done = fl_state("verify", kit / "local")
    assert (done.exit_code, "is not a startup kit" in done.stderr) == (1, True)


def test_show(kit: Path) -> None:  # noqa: F811
    lines = fl_state("show", kit).stdout.splitlines()
    assert lines[0].split() == ["RUN", "JOB", "STATUS", "ROUND", "SUBMITTER", "OPENED", "REASON"]
    assert lines[1].split()[:5] == ["1", "test", "finished", "3/3", "lead"]
    assert lines[2].split()[2:4] == ["training", "2/3"]
    rows = json.loads(fl_state("show", kit, "--json").stdout)["runs"]
    assert [(row["run"], row["round"]) for row in rows] == [(1, 3), (2, 2)]
    text = fl_state("show", kit, 1).stdout
    assert "model of round 3 published" in text
    whole = json.loads(fl_state("show", kit, 1, "--json").stdout)
    assert whole["list"][-1]["type"] == "RunEnded"
    done = fl_state("show", kit, 9)
    assert (done.exit_code, done.stderr) == (
        1,
        "fl_state: there is no run 9; there are runs 1 to 2\n",
    )


def test_text_from_elsewhere_is_harmless(kit: Path, sql) -> None:  # noqa: F811
    body = ev.SiteAnswered(site="a", accepted=False, reason="\x1b[2J" * 3).model_dump_json()
    sql(f"UPDATE events SET type='SiteAnswered', body='{body}' WHERE stream='run/2' AND seq=2")
    text = fl_state("show", kit, 2).stdout
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


def test_replay(kit: Path) -> None:  # noqa: F811
    done = fl_state("replay", kit, 1)
    assert done.exit_code == 0
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["same:"] * 3
    found = json.loads(fl_state("replay", kit, 1, 2, "--json").stdout)
    assert [each["outcome"] for each in found["rounds"]] == ["same"]
    for path in (kit / "state" / "blobs").glob("?" * 64):
        path.unlink()
    done = fl_state("replay", kit, 1)
    assert done.exit_code == 1  # nothing has freed them
    assert "round 1: error: the update of a is lost: blake3:" in done.stdout


def test_backup_and_restore(kit: Path, tmp_path: Path) -> None:  # noqa: F811
    done = fl_state("backup", kit, tmp_path / "b")
    assert (done.exit_code, done.stdout.startswith("backed up 2 runs")) == (0, True)
    done = fl_state("restore", tmp_path / "b", kit)
    assert done.exit_code == 1
    assert "there is a state in" in done.stderr
    assert "--move-aside" in done.stderr
    done = fl_state("restore", tmp_path / "b", kit, "--move-aside")
    assert done.exit_code == 0, done.stderr
    assert "the former state lies in" in done.stdout
    assert fl_state("verify", kit, "--deep").exit_code == 0


def test_what_a_restore_tells(
    kit: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "elsewhere" / "log.db"
    path.parent.mkdir()
    (kit / "local" / "resources.yml").write_text(f"state_url: sqlite:///{path}\n")
    (kit / "state" / "events.db").rename(path)
    fl_state("backup", kit, tmp_path / "b")
    done = fl_state("restore", tmp_path / "b", kit, "--move-aside")
    assert done.exit_code == 0, done.stderr
    assert f"the former event log lies in {path}.before-2" in done.stdout
    assert "not ended at the backup, and going on: 2; if the sites have ended" in done.stdout
    assert "abort it and submit its job again" in done.stdout
    assert "local files have it" not in done.stdout
    (kit / "local" / "resources.yml").unlink()
    done = fl_state("restore", tmp_path / "b", kit, "--move-aside")
    assert f"the event log lies where the backup's local files have it: {path}" in done.stdout

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flplatform.server.upkeep.restore._fill_log", full)
    done = fl_state("restore", tmp_path / "b", kit, "--move-aside")
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert f"run it again: fl_state restore {tmp_path / 'b'} {kit}" in done.stderr


def test_a_log_without_its_end(kit: Path) -> None:  # noqa: F811
    head = kit / "state" / "log-head"
    head.write_text('{"stream": "run/2", "seq": 999, "time": "2026-01-02T03:04:05Z"}')
    head.chmod(0o600)
    expected = "PROBLEM  state/log-head: own log: the event log has lost its end"
    done = fl_state("verify", kit)
    assert (done.exit_code, expected in done.stdout) == (1, True)
    done = fl_state("show", kit)
    assert (done.exit_code, expected in done.stderr) == (0, True)


def test_another_log_than_the_folders(kit: Path) -> None:  # noqa: F811
    (kit / "state" / "log-id").write_text(f"{'a' * 32}\n")
    (kit / "state" / "log-id").chmod(0o600)
    done = fl_state("verify", kit)
    assert done.exit_code == 1
    assert "PROBLEM  event log: own log: the state folder" in done.stdout
    assert "belongs to log aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa (see log-id), but" in done.stdout
    done = fl_state("show", kit)
    assert done.exit_code == 0
    assert "PROBLEM  event log: own log: the state folder" in done.stderr
    program = [sys.executable, "-m", "flplatform.entrypoints.server", str(kit)]
    server = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert server.returncode == EXIT_CONFIG
    assert "belongs to log aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa (see log-id), but" in server.stderr
    assert "correct state_url in local/resources.yml, or restore a backup" in server.stderr


@pytest.mark.parametrize("mounted", [False, True])
def test_a_state_that_is_not_mounted(kit: Path, mounted: bool) -> None:  # noqa: F811
    (kit / "log-id").write_bytes((kit / "state" / "log-id").read_bytes())
    (kit / "state").rename(kit.parent / "elsewhere")
    if mounted:
        (kit / "state").mkdir()
    program = [sys.executable, "-m", "flplatform.entrypoints.server", str(kit)]
    server = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert server.returncode == EXIT_CONFIG
    assert "cannot start: a server has worked on this kit before (log " in server.stderr
    assert f"the state folder {kit / 'state'} is empty; mount the state folder" in server.stderr
    assert not [*(kit / "state").iterdir()]
    for words in (["verify", kit], ["show", kit], ["replay", kit, 1], ["backup", kit, kit / "b"]):
        done = fl_state(*words)
        assert (done.exit_code, f"{kit / 'state'} is empty; " in done.output) == (1, True), words


def test_what_is_in_the_place_of_the_state_is_named(kit: Path, tmp_path: Path) -> None:  # noqa: F811
    fl_state("backup", kit, tmp_path / "b")
    (kit / "state").rename(tmp_path / "elsewhere")
    (kit / "state").touch()
    words = [["verify", kit], ["show", kit], ["backup", kit, tmp_path / "c"]]
    for each in (*words, ["restore", tmp_path / "b", kit]):
        done = fl_state(*each)
        assert (done.exit_code, f"{kit / 'state'} is no folder; " in done.stderr) == (1, True), each
    (kit / "state").unlink()
    (kit / "state").symlink_to("/mnt/none")
    for each in (*words, ["restore", tmp_path / "b", kit]):
        done = fl_state(*each)
        expected = f"{kit / 'state'} is a link to /mnt/none, which is not there; mount its disk"
        assert (done.exit_code, expected in done.stderr) == (1, True), each


def test_a_state_url_that_is_none_is_not_shown(kit: Path) -> None:  # noqa: F811
    text = "host=db password=S3cr3t"
    (kit / "local" / "resources.yml").write_text(f'state_url: "{text}"\n')
    for command in ("verify", "show"):
        done = fl_state(command, kit)
        assert done.exit_code == 1
        assert "state_url is not a database URL; use sqlite:////path" in done.stderr
        assert "S3cr3t" not in done.stderr + done.stdout


def test_verify_a_backup(kit: Path, tmp_path: Path) -> None:  # noqa: F811
    fl_state("backup", kit, tmp_path / "b")
    done = fl_state("verify", tmp_path / "b", kit)
    assert done.exit_code == 0
    first, last = done.stdout.splitlines()
    assert first.startswith("backup of server, made 20")
    assert "the signature and the digests of its" in first
    assert "blobs (every byte) and 5 audit records" in last
    found = json.loads(fl_state("verify", tmp_path / "b", kit, "--json").stdout)
    assert (found["problems"], found["every_byte"], found["files"] > 9) == ([], True, True)
    done = fl_state("verify", tmp_path / "b")
    assert (done.exit_code, f"fl_state verify {tmp_path / 'b'} KIT" in done.stderr) == (1, True)
    done = fl_state("verify", kit, kit)
    assert (done.exit_code, "is no backup" in done.stderr) == (1, True)
    (tmp_path / "b" / "events.db").write_bytes(b"")
    done = fl_state("verify", tmp_path / "b", kit)
    assert (done.exit_code, "events.db was changed or damaged" in done.stdout) == (1, True)


def test_one_bad_row_ends_no_command(kit: Path, sql, tmp_path: Path) -> None:  # noqa: F811
    sql("UPDATE events SET body=cast(x'7bff7d' as text) WHERE stream='run/2' AND seq=4")
    done = fl_state("verify", kit)
    assert (done.exit_code, "run/2 #4: readable event: run/2#4 is damaged" in done.stdout) == (
        1,
        True,
    )
    lines = fl_state("show", kit).stdout.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["finished", "unreadable"]
    assert "PROBLEM  run/2 #4" in fl_state("show", kit, 2).stdout
    assert fl_state("replay", kit, 1).exit_code == 0
    done = fl_state("replay", kit, 2)
    assert (done.exit_code, "run 2: error: some of its events" in done.stdout) == (1, True)
    assert fl_state("backup", kit, tmp_path / "b").exit_code == 1
    done = fl_state("backup", kit, tmp_path / "b", "--damaged")
    assert (done.exit_code, "PROBLEM  run/2 #4: readable event" in done.stdout) == (0, True)


@pytest.mark.parametrize("words", [["verify"], ["show", "a", "one"], ["mend", "a"]])
def test_wrong_usage(words: list[str]) -> None:
    assert fl_state(*words).exit_code == 2


def test_not_a_kit(tmp_path: Path) -> None:
    done = fl_state("verify", tmp_path)
    assert done.exit_code == 1
    assert "is not a startup kit" in done.stderr


def test_a_restore_that_did_not_end(kit: Path, tmp_path: Path) -> None:  # noqa: F811
    """No server begins an empty state; every command says what to do."""
    made_before = tmp_path / "before"
    fl_state("backup", kit, made_before)
    mark = Unfinished(
        backup="/my backup", options=("--damaged",), stamp="1", had_state=True, had_log=False
    )
    mark.begin(kit)
    (kit / "state").rename(kit / "state.before-1")
    words = f"run it again: fl_state restore '/my backup' {kit} --damaged"
    program = [sys.executable, "-m", "flplatform.entrypoints.server", str(kit)]
    server = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert server.returncode == EXIT_CONFIG
    assert "cannot start: a restore did not end (see " in server.stderr
    assert words in server.stderr
    assert not [*(kit / "state").iterdir()]
    done = fl_state("verify", kit)
    assert (done.exit_code, words in done.stdout) == (1, True)
    done = fl_state("show", kit)
    assert (done.exit_code, words in done.stderr) == (1, True)
    done = fl_state("backup", kit, tmp_path / "b")
    assert (done.exit_code, words in done.stderr) == (1, True)
    (kit / "restoring.json").write_text("{")
    done = fl_state("restore", made_before, kit)
    assert (done.exit_code, done.stderr.count("a restore did not end")) == (1, 1)
    mark.begin(kit)
    (kit / "state").rmdir()
    (kit / "state.before-1").rename(kit / "state")
    done = fl_state("show", kit)
    assert (done.exit_code, words in done.stderr) == (0, True)
    assert done.stdout.startswith("RUN")


ENDED = """
import signal, sys
from flplatform.entrypoints.state import main
from flplatform.server.upkeep import backup, building

def wait(*_):
    print("at work", flush=True)
    while True:
        signal.pause()

backup.sign = building.copy_file = wait
main()
"""


@pytest.mark.parametrize("command", ["backup", "restore"])
@pytest.mark.parametrize(
    ("number", "before"),
    [(signal.SIGTERM, None), (signal.SIGHUP, None), (signal.SIGTERM, signal.SIGHUP)],
    ids=["SIGTERM", "SIGHUP", "nohup"],
)
def test_a_signal_leaves_nothing_behind(
    kit: Path, tmp_path: Path, command: str, number: int, before: int | None  # noqa: F811
) -> None:  # fmt: skip
    fl_state("backup", kit, tmp_path / "b")
    there = sorted(path.name for folder in (kit, tmp_path) for path in folder.iterdir())
    words = [kit, tmp_path / "c"] if command == "backup" else [tmp_path / "b", kit, "--move-aside"]
    with subprocess.Popen(
        [sys.executable, "-c", ENDED, command, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(before, signal.SIG_IGN) if before else None,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        if before:
            os.kill(process.pid, before)
        os.kill(process.pid, number)
        assert process.wait(30) == 128 + number
    after = sorted(path.name for folder in (kit, tmp_path) for path in folder.iterdir())
    assert [name for name in after if name != "process.lock"] == there
    assert fl_state("verify", kit).exit_code == 0
