"""fl_state on the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flplatform.core import events as ev
from flplatform.entrypoints.state import app
from tests.unit.server.upkeep.conftest import _private, kit, made, place, sql  # noqa: F401


def fl_state(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_verify(kit: Path, sql) -> None:  # noqa: F811
    done = fl_state("verify", kit, "--deep")
    assert done.exit_code == 0
    assert done.stdout.startswith("no problem in 2 runs with ")
    (kit / "state" / "blobs" / ("f" * 64)).touch(0o444)
    sql("DELETE FROM events WHERE stream='run/1' AND seq=4")
    done = fl_state("verify", kit)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("PROBLEM  run/1 #4: I1 gapless stream: event 4 is missing; stop the")
    assert any(line.startswith("note  blob blake3:ffff") for line in lines)
    assert lines[-1].startswith("1 problem in 2 runs")
    found = json.loads(fl_state("verify", kit, "--json").stdout)
    assert [(each["where"], each["seq"]) for each in found["problems"]] == [("run/1", 4)]


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
    assert (done.exit_code, "inputs freed" in done.stdout) == (0, True)


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


@pytest.mark.parametrize("words", [["verify"], ["show", "a", "one"], ["mend", "a"]])
def test_wrong_usage(words: list[str]) -> None:
    assert fl_state(*words).exit_code == 2


def test_not_a_kit(tmp_path: Path) -> None:
    done = fl_state("verify", tmp_path)
    assert done.exit_code == 1
    assert "is not a startup kit" in done.stderr
