"""Tables and running text within a width: words are wrapped or cut, never broken."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

GAP = 2
_NARROW = 8  # columns that a text may shrink to
_LONG_WORDS = (16, 12, 8)  # a word up to here is not cut; the shorter ones when room is scarce
_LONG_TITLE = 12
_LONG_NAME = 24  # of the first column, which says what the row is about
_LABEL = re.compile(r"\s*(?:\S+(?: \S+)* {2,})?")


@dataclass(frozen=True)
class Cell:
    """One cell; `mark` is a character that follows it, outside its alignment."""

    text: str
    style: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        cells: from top to bottom.
        numeric: stands to the right, and is `whole`.
        whole: is neither wrapped nor cut.
    """

    title: str
    cells: Sequence[Cell]
    numeric: bool = False
    whole: bool = False

    @property
    def widest(self) -> int:
        """The columns that its widest cell takes."""
        return max((cell_len(cell.text) for cell in self.cells), default=0)

    @property
    def marked(self) -> int:
        """The columns that marks take."""
        return int(any(cell.mark for cell in self.cells))

    @property
    def natural(self) -> int:
        """The width that it has where there is room."""
        return max(self.widest, cell_len(self.title)) + self.marked

    def least(self, long_word: int) -> int:
        """The width below which it does not shrink; a word up to `long_word` is not cut."""
        if self.numeric or self.whole:
            return max(self.widest, min(cell_len(self.title), _LONG_TITLE)) + self.marked
        words = [word for cell in self.cells for word in cell.text.split()]
        longest = min(max(map(cell_len, words), default=0), long_word)
        return min(self.natural, max(longest, _NARROW))


def total(columns: Sequence[Column]) -> int:
    """The width of a table that has all the room it wants."""
    return sum(column.natural for column in columns) + GAP * (len(columns) - 1)


def table(
    columns: Sequence[Column], width: int, notes: Sequence[str] = (), indent: str = ""
) -> list[Text]:
    """The lines of a table.

    Texts shrink, the widest first, and wrap at words. If that is not enough the columns that do
    not fit follow in a second block, which repeats the first column.

    Args:
        columns: at least one; all have as many cells.
        width: columns of the terminal, `indent` included.
        notes: for each row what stands below it, or "".
        indent: begins every line.
    """
    room = width - len(indent)
    lines: list[Text] = []
    fitting = [word for word in _LONG_WORDS if _least(columns, word) <= room]
    long_word = fitting[0] if fitting else _LONG_WORDS[0]
    for block in _blocks(columns, room, long_word):
        widths = _widths(block, room, long_word)
        if lines:
            lines.append(Text())
        titles = [Cell(_cut(c.title, w), "bold") for c, w in zip(block, widths, strict=True)]
        lines.extend(_row(block, titles, widths, indent))
        for index in range(len(block[0].cells)):
            cells = [column.cells[index] for column in block]
            lines.extend(_row(block, cells, widths, indent))
            if index < len(notes) and notes[index]:
                lines.extend(_note(notes[index], width, indent))
        notes = ()  # once is enough
    return lines


def paragraph(line: str, width: int) -> str:
    """A line wrapped at words; what follows a label is indented as its text is."""
    if cell_len(line) <= width:
        return line
    label = _LABEL.match(line)
    hanging = label.end() if label else 0
    hanging = hanging if hanging <= width // 2 else len(line) - len(line.lstrip())
    first, rest = line[:hanging], line[hanging:]
    return ("\n" + " " * hanging).join(
        [first + part if i == 0 else part for i, part in enumerate(wrap(rest, width - hanging))]
    )


def wrap(text: str, width: int, cut: bool = False) -> list[str]:
    """A text in lines of at most `width` columns; a longer word overflows, or is cut."""
    lines: list[str] = []
    now = ""
    for word in re.findall(r"\s*\S+", text):
        if now and cell_len(now + word) > width:
            lines.append(now)
            now = word.lstrip()
        else:
            now += word if now or not lines else word.lstrip()
    lines.append(now)
    return [_cut(line, width) for line in lines] if cut else lines


def _leasts(columns: Sequence[Column], long_word: int) -> list[int]:
    first, *rest = columns
    return [first.least(_LONG_NAME), *(column.least(long_word) for column in rest)]


def _least(columns: Sequence[Column], long_word: int) -> int:
    return sum(_leasts(columns, long_word)) + GAP * (len(columns) - 1)


def _blocks(columns: Sequence[Column], room: int, long_word: int) -> Iterator[Sequence[Column]]:
    first, *rest = columns
    block = [first]
    for column in rest:
        if len(block) > 1 and _least([*block, column], long_word) > room:
            yield block
            block = [first]
        block.append(column)
    yield block


def _widths(columns: Sequence[Column], room: int, long_word: int) -> list[int]:
    widths = [column.natural for column in columns]
    least = _leasts(columns, long_word)
    for _ in range(total(columns) - room):
        loose = [i for i in range(len(columns)) if widths[i] > least[i]]
        if not loose:
            break
        widths[max(loose, key=lambda i: widths[i])] -= 1
    return widths


def _row(
    columns: Sequence[Column], cells: Sequence[Cell], widths: Sequence[int], indent: str
) -> Iterator[Text]:
    wrapped = [
        [cell.text] if column.numeric or column.whole else wrap(cell.text, width, cut=True)
        for column, cell, width in zip(columns, cells, widths, strict=True)
    ]
    for number in range(max(map(len, wrapped))):
        line = Text(indent)
        for column, cell, parts, width in zip(columns, cells, wrapped, widths, strict=True):
            text = parts[number] if number < len(parts) else ""
            room = width - column.marked
            blank = " " * max(room - cell_len(text), 0)
            mark = (cell.mark if number == 0 else "").ljust(column.marked)
            line.append(blank if column.numeric else "").append(text, cell.style)
            line.append(mark, cell.style).append("" if column.numeric else blank).append(" " * GAP)
        line.rstrip()
        yield line


def _note(text: str, width: int, indent: str) -> Iterator[Text]:
    for part in wrap(text, max(width - len(indent) - 4, 20)):
        yield Text(f"{indent}    ").append(part, "yellow")


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(width - 1, 0)).rstrip() + "…"
