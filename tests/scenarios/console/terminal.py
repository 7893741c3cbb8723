"""The console at a terminal of 100 columns, typed at by a program."""

import os
import re
import sys
import time
from pathlib import Path

import pexpect

from tests.scenarios.console.screen import Screen

COLUMNS = 100
DEADLINE_S = 60.0
_PROMPT = re.compile(r"fl:.*> $")
_QUESTION = re.compile(r".*(?:\[y/N\] |(?:passphrase|password)[^:]*: )$")


class Terminal:
    """One console; it is opened on the first command, and again after it has ended.

    Args:
        kit: of the admin.
        passphrase: opens the kit.

    Attributes:
        raw: what the console has written since the last command was typed.
    """

    def __init__(self, kit: Path, passphrase: str) -> None:
        self._kit = kit
        self._passphrase = passphrase
        self._console: pexpect.spawn[str] | None = None
        self._screen = Screen()
        self.raw = ""

    def close(self) -> None:
        """End the console."""
        if self._console is not None:
            self._console.close(force=True)
            self._console = None

    def run(self, line: str, answers: list[str]) -> list[str]:
        """Type a command, answer its questions, and return what is shown.

        Args:
            line: the command.
            answers: to its questions, in order; a question beyond them is answered with `n`.

        Returns:
            The lines below the command; after each question, `< ANSWER`.

        Raises:
            TimeoutError: neither prompt nor question came.
            ValueError: the command would fill more than the line of the prompt.
        """
        if self._console is None:
            self._open()
        if len(self._screen.line) + len(line) >= COLUMNS:
            raise ValueError(f"{line!r} does not fit on the line of the prompt")
        waiting, shown = list(answers), []
        self.raw = ""
        start = self._send(line)
        while self._until_input(start) == "question":
            answer = waiting.pop(0) if waiting else "n"
            shown += [*self._screen.lines[start : self._screen.row + 1], f"< {answer}"]
            start = self._send(answer)
        shown += self._screen.lines[start : self._screen.row if self._console else None]
        while shown and not shown[-1].strip():
            shown.pop()
        return shown

    def _open(self) -> None:
        self._screen = Screen()
        self._console = pexpect.spawn(
            str(self._kit / "startup" / "fl_admin.sh"),
            dimensions=(60, COLUMNS),
            encoding="utf8",
            codec_errors="replace",
            echo=False,
            env={
                **{key: value for key, value in os.environ.items() if key != "COLUMNS"},
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "FLP_PYTHON": sys.executable,
            },
        )
        self._until_input(0)
        self._until_input(self._send(self._passphrase))

    def _send(self, line: str) -> int:
        """Type a line; return the row below it."""
        assert self._console is not None
        below = self._screen.row + 1
        self._console.send(f"{line}\r")
        return below

    def _until_input(self, start: int) -> str:
        """Read until something can be typed, not above row `start`, or the console has ended."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            assert self._console is not None
            try:
                text = self._console.read_nonblocking(1 << 16, timeout=0.5)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                self.close()
                return "end"
            self.raw += text
            self._screen.feed(text)
            if self._screen.row >= start and _PROMPT.fullmatch(self._screen.line):
                return "prompt"
            if self._screen.row >= start and _QUESTION.fullmatch(self._screen.line):
                return "question"
        shown = "\n".join(self._screen.lines[-40:])
        raise TimeoutError(f"the console shows no prompt after {DEADLINE_S} s:\n{shown}")
