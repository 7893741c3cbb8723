"""Text from elsewhere made harmless: what a terminal would obey comes out as visible characters."""

from typing import Final

MAX_CELL: Final = 200
"""Characters of a table's cell or of a short message."""

MAX_LINE: Final = 4000
"""Characters of one line of text."""


def escape(text: str, limit: int = MAX_CELL) -> str:
    r"""One line without a control character, at most `limit` characters long.

    Control bytes, terminal sequences, line ends and characters that reorder or hide others become
    what a Python literal would show: ESC is `\x1b`. A longer text ends in an ellipsis.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown
        )
    return shown if len(text) <= limit and len(shown) <= limit else shown[: limit - 1] + "…"


def escape_lines(text: str) -> str:
    """As `escape` for each line of a text; its tabs become spaces."""
    lines = text.expandtabs(8).removesuffix("\n").replace("\r\n", "\n").split("\n")
    return "\n".join(escape(line, MAX_LINE) for line in lines)
