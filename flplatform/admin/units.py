"""Numbers with units in sentences; cells of tables carry raw numbers, see `hci.units`."""

from flplatform.hci.units import days as _days
from flplatform.hci.units import moment, number, size
from flplatform.hci.units import seconds as _seconds

__all__ = ["count", "days", "moment", "score", "seconds", "size"]


def seconds(value: float | None) -> str | None:
    """Return `1.2 s`, `14 min` or `3 h 5 min`; None stays None."""
    return None if value is None else _seconds(value)


def days(value: float | None) -> str | None:
    """Return `341 d`, with a `!` in the last 30 days; None stays None."""
    return None if value is None else _days(value)


def count(number: int, noun: str) -> str:
    """Return `1 site` or `1,024 sites`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def score(value: float | None) -> str:
    """Return a score as every plain number is printed: `.746`, `12.35`; `–` for None."""
    return "–" if value is None else number(value)
