"""Numbers with units, as people read them."""


def seconds(value: float | None) -> str | None:
    """Return `1.2 s`, `14 min` or `3 h 5 min`; None stays None."""
    if value is None:
        return None
    if value < 100:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Return `56 B`, `18.2 kB` or `1.3 GB`."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.3g} {units[0]}"


def days(value: float | None) -> str | None:
    """Return `341 d`, with a `!` in the last 30 days; None stays None."""
    return None if value is None else f"{value:.0f} d" + " !" * (value < 30)


def count(number: int, noun: str) -> str:
    """Return `1 site` or `1,024 sites`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def moment(text: str) -> str:
    """Return the seconds of an ISO time: `2024-05-01 12:04:10`."""
    return text[:19].replace("T", " ")


def score(value: float | None) -> str:
    """Return three digits, as scores are printed: `.746`, `12.3`; `–` for None."""
    if value is None:
        return "–"
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
