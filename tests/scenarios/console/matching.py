"""Expected lines with placeholders for what differs from one time to the next.

Runs of blanks count as one, and empty lines for nothing. A line that is only `…` stands for any
number of lines.
"""

import re
import socket
from collections.abc import Callable, Sequence
from functools import partial

GAP = "…"
BAR = "━"
_DURATION = r"\d[\d.,]* (?:ms|s|min|h)(?: \d+ (?:s|min))?"
_SIZE = r"\d[\d.,]* (?:B|kB|MB|GB|TB)(?:/s)?"
_DATE = r"\d{4}-\d\d-\d\d"
_TIME = rf"(?:{_DATE}[T ])?\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z?"
PLACEHOLDERS = {
    "time": _TIME,
    "date": _DATE,
    "digest": r"(?:blake3|sha256):[0-9a-f]{6,}…?",
    "id": r"[0-9a-f]{8,64}",
    "address": r"(?:ipv4:)?[\w.]+:\d{2,5}",
    "bytes": _SIZE,
    "seconds": _DURATION,
    "days": r"\d+ d",
    "version": r"\d+\.\d+\.\d+",
    "number": r"-?[\d.,]+",
    "word": r"\S+",
    "path": r"/\S+",
    "host": re.escape(socket.gethostname()),
    "any": r".*",
}
_DRAFT = (
    # "no reply after 2.0 s" is a promise, not a measurement
    ("time", rf"{_DATE}[T ]\d\d:\d\d\S*|(?<![\w.:])\d\d:\d\d:\d\d(?:\.\d+)?Z?"),
    ("date", rf"(?<![\w-]){_DATE}(?![\w-])"),  # of a time that was wrapped behind its date
    ("digest", PLACEHOLDERS["digest"]),
    ("path", r"(?<!\S)/(?:tmp|var|home|root)/\S+"),
    (
        "id",
        r"(?<![\w.])(?:[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{16}|(?=[a-f]*\d)(?:[0-9a-f]{12}|[0-9a-f]{8}))\b",
    ),
    ("address", r"\bipv4:[\d.]+:\d+|\blocalhost:\d+"),
    ("bytes", rf"(?<![\w.]){_SIZE}(?!\w)"),
    ("seconds", rf"(?<!after )(?<![\w.]){_DURATION}(?!\w)"),
    ("days", r"(?<![\w.])\d+ d\b"),
    ("version", r"(?<![\w.])\d+\.\d+\.\d+(?![\w.])"),
    ("number", r"(?<![\w.])-?\d*\.\d+(?![\w.])(?! s)"),
    ("host", rf"(?<!\S){re.escape(socket.gethostname())}(?!\S)"),
)
_PLACEHOLDER = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")


def normal(line: str) -> str:
    """Return a line with single blanks and none at its ends."""
    return " ".join(line.split())


def pattern(expected: str) -> str:
    """Return the regular expression of an expected line."""
    pieces = _PLACEHOLDER.split(normal(expected))
    return "".join(
        PLACEHOLDERS[piece] if index % 2 else re.escape(piece) for index, piece in enumerate(pieces)
    )


def matches(expected: Sequence[str], actual: Sequence[str]) -> bool:
    """Return whether the lines are what was expected."""
    whole = "".join(
        r"(?:.*\n)*?" if line.strip() == GAP else f"(?:{pattern(line)})\n"
        for line in expected
        if line.strip()
    )
    text = "".join(f"{normal(line)}\n" for line in actual if line.strip())
    return re.fullmatch(whole, text) is not None


def draft(line: str) -> str:
    """Return a line with placeholders where it is bound to differ next time.

    Blanks behind a placeholder make room for it, so that columns stay below each other.
    """
    line = line.rstrip()
    if BAR in line:  # of progress: how far it came depends on when it was looked at
        return f"{line.split()[0]} {BAR}{{any}}"
    for name, what in _DRAFT:
        line = re.sub(f"(?:{what})(?P<blanks> *)", partial(_placeholder, name), line)
    return line.rstrip()


def _placeholder(name: str, found: re.Match[str]) -> str:
    width = len(found[0]) - 1 if found["blanks"] else 0
    return f"{{{name}}}".ljust(width) + " " * bool(found["blanks"])


def update(
    expected: Sequence[str], actual: Sequence[str], draft: Callable[[str], str] = draft
) -> list[str]:
    """Return what to expect from now on: what was expected, wherever it still holds.

    Args:
        expected: what was expected.
        actual: what came.
        draft: makes an expected line of one that came.
    """
    if expected and matches(expected, actual):
        return list(expected)
    known = [line for line in expected if line.strip() != GAP]
    return [
        next((old for old in known if re.fullmatch(pattern(old), normal(line))), draft(line))
        for line in actual
    ]
