"""Where `watch` draws on a terminal: one look after another, in place."""

import io
import shutil
from collections.abc import Callable
from datetime import datetime
from typing import TextIO

from rich.cells import set_cell_size


class Sheet(io.StringIO):
    """Text for a terminal, gathered so that it can be drawn in one piece."""

    def isatty(self) -> bool:
        """Whether colour and an indent are wanted: they are."""
        return True


class Screen:
    """A screen of its own on a terminal; what is below its end is cut off and counted.

    Args:
        out: a terminal.
        size: returns columns and lines.
    """

    def __init__(
        self,
        out: TextIO,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:
        self._out = out
        self._size = size
        self._last = ""

    def __enter__(self) -> "Screen":
        self._out.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_: object) -> None:
        # The last look stays in sight where the user goes on typing.
        self._out.write("\x1b[?25h\x1b[?1049l" + self._last)
        self._out.flush()

    def draw(self, left: str, right: str, text: str) -> None:
        """Draws a heading and a text over what was there; nothing flickers.

        Args:
            left: stands at the left of the heading.
            right: stands at its right.
            text: lines, with colour.
        """
        columns, height = self._size()
        self._last = text
        lines = text.removesuffix("\n").split("\n")
        if len(lines) > height - 2:
            more = len(lines) - height + 3
            lines = [*lines[: height - 3], f"  … {more} lines more"]
        room = max(columns - len(right) - 2, 10)
        heading = f"\x1b[2m{set_cell_size(left, room)}  {right}\x1b[0m"
        drawn = "".join(line + "\x1b[K\r\n" for line in (heading, "", *lines))
        self._out.write("\x1b[H" + drawn.removesuffix("\r\n") + "\x1b[J")
        self._out.flush()


def now() -> str:
    """The time of day here."""
    return datetime.now().astimezone().strftime("%H:%M:%S")
