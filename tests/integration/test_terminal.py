"""The console at a real terminal: keys in, what a person sees out."""

import os
import sys
from pathlib import Path

import pexpect
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = r"toy (\d+) >"
SCREEN, BACK = r"\x1b\[\?1049h", r"\x1b\[\?1049l"


@pytest.fixture
def open_console(tmp_path):
    opened = []

    def start() -> pexpect.spawn:
        console = pexpect.spawn(
            sys.executable,
            ["-m", "tests.support.toy_console", str(tmp_path / "history")],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"},
            dimensions=(24, 80),
            timeout=60,
            encoding="utf-8",
        )
        opened.append(console)
        console.expect(PROMPT)
        return console

    yield start
    for console in opened:
        console.close(force=True)


def leave(console: pexpect.spawn) -> None:
    console.sendline("bye")
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0


def test_prompt_completion_and_history(open_console, tmp_path):
    console = open_console()
    console.send("loo\t")
    console.expect("k")
    console.send("cle\t")
    console.expect("veland")
    console.send("\r")
    console.expect("cleveland.*1 ok")
    console.expect(r"toy 1 >")  # the prompt shows at once what the command has changed
    console.sendline("loko")
    console.expect("did you mean look")
    leave(console)
    again = open_console()
    again.send("\x12cle\r\r")  # Ctrl-R
    again.expect("look cleveland")
    again.expect("1 ok")
    leave(again)
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600


def test_ctrl_c_ends_the_command_and_not_the_console(open_console):
    console = open_console()
    console.sendline("hang")
    console.expect("hanging")
    console.sendintr()
    console.expect("interrupted")
    console.expect(PROMPT)
    console.sendline("ops")
    console.expect("nothing is under way")
    leave(console)


def test_a_question_is_answered_with_yes(open_console):
    console = open_console()
    console.sendline("drop hungary")
    console.expect(r"drop hungary\. Continue\? \[y/N\]")
    console.sendline("yes")
    console.expect("1 ok")
    console.expect("toy 1 >")
    console.sendline("drop hungary")
    console.expect(r"\[y/N\]")
    console.sendline("")
    console.expect("nothing was done")
    leave(console)


def test_watch_draws_in_place_until_ctrl_c(open_console):
    console = open_console()
    console.sendline("watch --every 0.2 look hungary")
    console.expect(SCREEN)
    console.expect(r"every 0\.2 s: look hungary.*\d\d:\d\d:\d\d")
    console.expect(r"hungary +3 +1\.2 s")
    console.sendintr()
    console.expect(BACK)
    console.expect(r"hungary +\d+ +1\.2 s", searchwindowsize=2000)
    console.expect(PROMPT)
    leave(console)


def test_a_reply_goes_into_a_file(open_console, tmp_path):
    console = open_console()
    path = tmp_path / "reply.txt"
    console.sendline(f"look cleveland > {path}")
    console.expect("written to")
    console.sendline(f"look hungary >> {path}")
    console.expect("written to")
    lines = path.read_text().splitlines()
    assert [line.split() for line in lines] == [
        ["TARGET", "LOOK", "SINCE"],
        ["cleveland", "1", "1.2", "s"],
        ["1", "ok", *lines[2].split()[2:]],
        ["TARGET", "LOOK", "SINCE"],
        ["hungary", "2", "1.2", "s"],
        ["1", "ok", *lines[5].split()[2:]],
    ]
    assert "\x1b" not in path.read_text()
    leave(console)
