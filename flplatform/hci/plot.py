"""Curves in a terminal: braille dots, eight to a character."""

import sys
from collections.abc import Mapping, Sequence

from rich.text import Text

from flplatform.hci.escape import escape
from flplatform.hci.units import number

_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # [row][column] of a character


def plot(
    name: str,
    x: str,
    series: Mapping[str, Sequence[float]],
    *,
    width: int = 60,
    height: int = 8,
    colour: bool = True,
    ends: tuple[int, int] | None = None,
) -> Text:
    """Curves over the common x axis 1, 2, ..., drawn with one y scale.

    With colour all curves share one picture and a legend names them; without it each has its own.
    Values that are not finite leave gaps.

    Args:
        name: heading.
        x: label of the x axis.
        series: label -> values.
        width: characters of the drawing, without its y labels.
        height: lines of each drawing.
        colour: whether colours can be told apart.
        ends: what the first and the last value stand at; default 1 and their number.
    """
    curves = {escape(label): _points(values) for label, values in series.items()}
    values = [y for points in curves.values() for _, y in points]
    picture = Text().append(escape(name), style="bold")
    if not values:
        return picture.append("  no values", style="dim")
    low, high = min(values), max(values)
    last = max(len(given) for given in series.values())
    groups = [curves] if colour else [{label: points} for label, points in curves.items()]
    for group in groups:
        for index, label in enumerate(group):
            style = _COLOURS[index % len(_COLOURS)] if colour else ""
            picture.append("  " + label, style=style)
        gutter = max(len(number(low)), len(number(high)))
        for row, line in enumerate(_draw(group, low, high, last, width, height)):
            value = number(high) if row == 0 else number(low) if row == height - 1 else ""
            picture.append(f"\n{value:>{gutter}} │").append(line)
        begin, until = ends or (1, last)
        end = f"{escape(x)} {until}"
        picture.append(f"\n{'':>{gutter}} └{begin}{end:>{width - len(str(begin))}}\n")
    picture.rstrip()
    return picture


def _points(values: Sequence[float]) -> list[tuple[int, float]]:
    largest = sys.float_info.max
    return [
        (i, y) for i, y in enumerate(values) if isinstance(y, int | float) and abs(y) <= largest
    ]


def _draw(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    low: float,
    high: float,
    last: int,
    width: int,
    height: int,
) -> list[Text]:
    """The lines of one picture; a later curve colours the characters that it shares."""
    bits = [[0] * width for _ in range(height)]
    styles = [[""] * width for _ in range(height)]
    right, bottom = 2 * width - 1, 4 * height - 1
    span = (high / 2 - low / 2) or 0.5  # half the range, which cannot overflow
    for index, points in enumerate(curves.values()):
        before: tuple[int, int, int] | None = None  # index, column, row
        for i, y in points:
            column = round(i * right / max(last - 1, 1))
            row = round((high / 2 - y / 2) / span * bottom)
            start = before if before and before[0] == i - 1 else (i, column, row)
            before = (i, column, row)
            _, from_column, from_row = start
            steps = max(abs(column - from_column), abs(row - from_row), 1)
            for step in range(steps + 1):
                c = from_column + (column - from_column) * step // steps
                r = from_row + (row - from_row) * step // steps
                bits[r // 4][c // 2] |= _DOTS[r % 4][c % 2]
                styles[r // 4][c // 2] = _COLOURS[index % len(_COLOURS)]
    lines = []
    for row_bits, row_styles in zip(bits, styles, strict=True):
        line = Text()
        for bit, style in zip(row_bits, row_styles, strict=True):
            line.append(chr(0x2800 + bit) if bit else " ", style=style)
        line.rstrip()
        lines.append(line)
    return lines
