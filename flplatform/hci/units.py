"""Numbers as people read them, and how the name of a value tells its unit.

A reply carries raw numbers. The unit is in the name, as everywhere in this project: `since_s` are
seconds, `p99_ms` milliseconds, `disk_bytes` are bytes, `certificate_days` are days, `share_percent`
is a percentage; `started_at` is an ISO time. Whoever prints a value calls `shown`, so that text and
JSON come from one number.
"""

import math
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

Unit: TypeAlias = Literal["", "s", "ms", "bytes", "days", "percent", "at"]

OF: Final = "_of"
"""Ends the name of a value that is the whole of another: `round` and `round_of` are `4/15`."""

_SUFFIXES: dict[str, Unit] = {
    "_s": "s",
    "_ms": "ms",
    "_bytes": "bytes",
    "_days": "days",
    "_percent": "percent",
    "_at": "at",
}
_SIZES: Final = ("B", "kB", "MB", "GB", "TB")
_SHORT: Final = {"certificate": "cert"}
"""Headings of names that would be wider than all their values."""


def unit_of(name: str) -> Unit:
    """The unit that a name tells."""
    return next((unit for suffix, unit in _SUFFIXES.items() if name.endswith(suffix)), "")


def heading(name: str) -> str:
    """A name as the heading of a column: `last_seen_s` is LAST SEEN."""
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    bare = name.removesuffix(suffix) or name
    return _SHORT.get(bare, bare).replace("_", " ").upper()


def shown(value: float | str, unit: Unit = "") -> str:
    """A value with its unit; text that is no number is returned as it is."""
    if isinstance(value, str):
        return _short_moment(value, datetime.now(UTC).date().isoformat()) if unit == "at" else value
    if isinstance(value, float) and not math.isfinite(value):
        return number(value)
    match unit:
        case "s":
            return seconds(value)
        case "ms":
            return f"{value:.1f} ms" if value < 1000 else seconds(value / 1000)
        case "bytes":
            return size(value)
        case "percent":
            return f"{value:.1f} %"
        case "days":
            return days(value)
        case _:
            return number(value)


def fraction(part: str, whole: str) -> str:
    """Two shown values, the second of which is the whole: `4/15`, `22.9 of 25.3 GB`."""
    amount, _, unit = part.partition(" ")
    if whole == "–":
        return part
    if not unit:
        return f"{part}/{whole}"
    return f"{amount if whole.endswith(f' {unit}') else part} of {whole}"


def number(value: float) -> str:
    """A plain number: `12`, `.746`, `12.35`, `1.2e-05`; one way wherever a person reads one."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size_of = abs(value)
    if size_of >= 1e4:
        return f"{value:.0f}" if size_of < 1e12 else f"{value:.4g}"
    if 0 < size_of < 5e-4:
        return f"{value:.1e}"
    text = f"{value:.3f}" if size_of < 10 else f"{value:.4g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def seconds(value: float) -> str:
    """`1.2 s`, `14 min`, `3 h 5 min` or `2 d 4 h`."""
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size(count: float) -> str:
    """`56 B`, `18.2 kB` or `1.3 GB`."""
    steps = 0
    while count >= 999.5 and steps < len(_SIZES) - 1:
        count /= 1000
        steps += 1
    return f"{count:.0f} B" if steps == 0 else f"{count:.3g} {_SIZES[steps]}"


def days(value: float) -> str:
    """`341 d`, with a `!` in the last 30 days."""
    return f"{value:.0f} d" + " !" * (value < 30)


def moment(text: str) -> str:
    """The seconds of an ISO time: `2024-05-01 12:04:10`."""
    return text[:19].replace("T", " ")


def _short_moment(text: str, today: str) -> str:
    """A moment for a column: the time if it is of today, else day and minute."""
    day, _, time = moment(text).partition(" ")
    return time if time and day == today else f"{day} {time[:5]}".rstrip()
