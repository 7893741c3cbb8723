"""Reply items as text for a terminal or as one JSON object.

Every string of an item came from elsewhere and is escaped; nothing of it is read as markup.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from flplatform.hci.connection import Item
from flplatform.hci.escape import escape, escape_lines
from flplatform.hci.layout import Cell, Column, paragraph, table, total
from flplatform.hci.plot import plot
from flplatform.hci.units import OF, Unit, fraction, heading, shown, unit_of

JSON_SCHEMA: Final = "flplatform.command/1"
"""Names the form of `JsonRenderer`'s object."""

_WIDE = 100_000  # columns of a pipe: a line is never broken
_STATUS_STYLES = {"ok": "green", "refused": "yellow"}
_MARKS = {"best": ("bold green", "*"), "worst": ("red", "")}  # style, what a pipe shows
_STATUS_TEXTS = {
    "error": "error: {}",
    "refused": "refused: {}",
    "no_reply": "no reply {}",
    "unknown": "unknown {}",
}


class Renderer(Protocol):
    """Shows the reply of one command."""

    def show(self, item: Item) -> None:
        """Takes the next item; `done`, `confirm` and `session` are not for it."""
        ...

    def flush(self) -> None:
        """Shows what was held back, because the user is about to be asked something."""
        ...

    def finish(self, exit_code: int, seconds: float, /) -> None:
        """The reply is complete."""
        ...


class TextRenderer:
    """Lines for people: aligned columns, errors on `err`, colour only on a terminal that has it.

    Args:
        out: where the reply goes.
        err: where errors go.
        env: for `NO_COLOR`, `TERM` and `COLUMNS`.
        live: whether progress may be drawn.
    """

    def __init__(
        self, out: TextIO, err: TextIO, env: Mapping[str, str] = os.environ, *, live: bool = True
    ) -> None:
        self._live = live
        self._out = _console(out, env)
        self._err = _console(err, env)
        self._indent = "  " if out.isatty() else ""
        self._rows: list[Item] = []
        self._ok = self._failed = 0
        self._bar: _Bar | None = None
        self._width = 0

    def show(self, item: Item) -> None:
        """Shows an item; rows are held back until their columns are known."""
        try:
            self._show(item)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            self._print(self._err, Text(f"unreadable reply: {escape(repr(item))}", "red"))

    def flush(self) -> None:
        """Ends the progress bar and shows the rows held back as one table."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._ok += sum(row["status"] == "ok" for row in rows)
        self._failed += sum(row["status"] != "ok" for row in rows)
        names = list(dict.fromkeys(column for row in rows for column in row["cells"]))
        columns = _columns(names, [[row["cells"].get(name) for name in names] for row in rows])
        targets = Column("TARGET", [Cell(escape(row["target"])) for row in rows])
        statuses = [_status(row) for row in rows]
        notes: list[str] = []
        if any(status.text != "ok" for status in statuses) or not columns:
            long = [targets, Column("STATUS", statuses), *columns]
            if total(long) <= self._room or len(columns) < 2:
                columns = long
            else:  # the sentences do not fit beside the cells: below them they do
                notes = ["" if status.text == "ok" else status.text for status in statuses]
                columns = [targets, *columns]
        else:
            columns = [targets, *columns]
        self._table(columns, notes)

    def finish(self, _: int, seconds: float, /) -> None:
        """Shows what is held back, and after rows one summary line."""
        self.flush()
        if self._ok or self._failed:
            counts = [f"{self._ok} ok"] if self._ok else []
            counts += [f"{self._failed} failed"] if self._failed else []
            left, right = " · ".join(counts), f"{seconds:.2f} s"
            gap = max(self._width - len(left) - len(right), 4)
            self._print(self._out, Text(f"{self._indent}{left}{' ' * gap}{right}", "dim"))

    def _show(self, item: Item) -> None:
        kind = item["type"]
        if kind == "row":
            self._rows.append(_row(item))
            return
        if kind == "progress":
            self._progress(item)
            return
        if kind == "text" and self._bar is not None and not self._bar.finished:
            self._text(escape_lines(str(item["text"])))  # the bar stays below it
            return
        self.flush()
        if kind == "text":
            self._text(escape_lines(str(item["text"])))
        elif kind == "table":
            self._table(_table_columns(item))
        elif kind == "plot":
            colour = self._out.color_system is not None
            width = max(min(self._out.width - 16, 100), 10)
            self._print(
                self._out,
                plot(str(item["name"]), str(item["x"]), item["series"], width=width, colour=colour),
            )
        elif kind == "error":
            self._error(item)
        elif kind == "operation":
            if self._live and self._out.is_terminal:
                self._text(f"operation {escape(str(item['id']))}: cancel ends it, ops shows it")
        elif kind != "data":
            raise ValueError(kind)

    def _error(self, item: Item) -> None:
        field = f"{item['field']}: " if item.get("field") else ""
        rule = f" (rule: {item['rule']})" if item.get("rule") else ""
        if item.get("rule") and str(item["rule"]) in str(item["message"]):
            rule = ""  # it has been said
        text = escape_lines(f"error: {field}{item['message']}{rule}")
        self._print(self._err, Text(_wrapped(text, self._err), style="red"))
        if item.get("hint"):
            hint = escape_lines(f"  {item['hint']}")
            self._print(self._err, Text(_wrapped(hint, self._err)))

    def _text(self, text: str) -> None:
        lines = (self._indent + line for line in text.split("\n"))
        self._print(self._out, Text("\n".join(_wrapped(line, self._out) for line in lines)))

    @property
    def _room(self) -> int:
        return self._out.width - len(self._indent)

    def _table(self, columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
        lines = table(columns, self._out.width, notes, self._indent)
        self._width = max(line.cell_len for line in lines) - len(self._indent)
        self._print(self._out, Text("\n").join(lines))

    def _progress(self, item: Item) -> None:
        if not self._live or not self._out.is_terminal or self._out.is_dumb_terminal:
            return
        if self._bar is None or self._bar.unit != item["unit"]:
            self.flush()
            self._bar = _Bar(self._out, str(item["unit"]))
        self._bar.show(str(item["label"]), item["done"], item["total"])

    def _print(self, console: Console, what: RenderableType) -> None:
        if console.is_terminal:
            console.print(what, soft_wrap=isinstance(what, Text))
        else:  # rich pads columns to their width; a pipe wants no trailing blanks
            with console.capture() as captured:
                console.print(what, soft_wrap=isinstance(what, Text))
            lines = captured.get().removesuffix("\n").split("\n")
            console.file.write("".join(line.rstrip() + "\n" for line in lines))
        console.file.flush()


class JsonRenderer:
    """One JSON object per command, on one line; `docs/json.md` describes it.

    Its keys: `schema`, `command`, `ok`, `exit_code`, `rows` (items of type row), `tables`, `plots`,
    `data` {name: value}, `text`, `errors`, `operation`, `seconds`. A number that is not finite is
    null.

    Args:
        out: where the object goes.
        command: the line that was typed.
    """

    def __init__(self, out: TextIO, command: str) -> None:
        self._out = out
        self._command = command
        self._items: dict[str, list[Any]] = {}
        self._data: dict[str, Any] = {}
        self._operation: str | None = None

    def show(self, item: Item) -> None:
        """Keeps an item."""
        kind = item.get("type")
        if kind == "data":
            self._data[str(item.get("name"))] = item.get("value")
        elif kind == "text":
            self._items.setdefault("text", []).append(item.get("text"))
        elif kind == "operation":
            self._operation = str(item.get("id"))
        elif kind in ("row", "table", "plot", "error"):
            fields = {key: value for key, value in item.items() if key != "type"}
            self._items.setdefault(kind, []).append(fields)

    def flush(self) -> None:
        """Does nothing: the object is written when it is complete."""

    def finish(self, exit_code: int, seconds: float, /) -> None:
        """Writes the object."""
        items = self._items
        document = {
            "schema": JSON_SCHEMA,
            "command": self._command,
            "ok": exit_code == 0,
            "exit_code": exit_code,
            "rows": items.get("row", []),
            "tables": items.get("table", []),
            "plots": items.get("plot", []),
            "data": self._data,
            "text": items.get("text", []),
            "errors": items.get("error", []),
            "operation": self._operation,
            "seconds": round(seconds, 6),
        }
        # ASCII only: no byte of the reply can steer a terminal.
        self._out.write(json.dumps(_finite(document), allow_nan=False) + "\n")
        self._out.flush()


class _Speed(TransferSpeedColumn):
    """As rich has it, but nothing while nothing is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.finished_speed or task.speed else Text("")


class _Bar:
    """A progress bar that is redrawn when told."""

    def __init__(self, console: Console, unit: str) -> None:
        self.unit = unit
        amounts: list[ProgressColumn] = (
            [DownloadColumn(), _Speed()]
            if unit == "B"
            else [MofNCompleteColumn(), TextColumn(escape(unit), markup=False)]
        )
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            *amounts,
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, label: str, done: float, total: float | None) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(escape(label), total=total)
        self._progress.update(self._tasks[label], completed=done, total=total)
        self._progress.refresh()

    @property
    def finished(self) -> bool:
        """Whether all that it shows is done."""
        return self._progress.finished

    def stop(self) -> None:
        self._progress.stop()


def _console(file: TextIO, env: Mapping[str, str]) -> Console:
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(errors="backslashreplace")  # an odd locale must not end the console
    terminal = file.isatty()
    plain = not terminal or env.get("NO_COLOR") or env.get("TERM") in ("dumb", "unknown")
    columns = env.get("COLUMNS", "")
    return Console(
        file=file,
        force_terminal=terminal,
        color_system=None if plain else "auto",
        width=int(columns)
        if columns.isdecimal() and columns != "0"
        else None
        if terminal
        else _WIDE,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _row(item: Item) -> Item:
    """A row with the fields that `flush` relies on.

    Raises:
        KeyError, TypeError, ValueError: the item is not a row.
    """
    return {
        "target": str(item["target"]),
        "status": str(item["status"]),
        "detail": str(item.get("detail", "")),
        "cells": dict(item.get("cells", {})),
    }


def _status(row: Item) -> Cell:
    status, detail = row["status"], row["detail"]
    if status in _STATUS_TEXTS:
        text = _STATUS_TEXTS[status].format(detail)
    else:
        text = f"{status}: {detail}" if detail else status
    return Cell(escape(text.rstrip(": ")), _STATUS_STYLES.get(status, "red"))


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Column]:
    """Columns whose names tell their units; a whole joins its part: `4/15`."""
    places = {name: index for index, name in enumerate(names)}
    columns = []
    for name, index in places.items():
        if name.endswith(OF) and name.removesuffix(OF) in places:
            continue
        unit, values = unit_of(name), [row[index] for row in rows]
        cells = [_cell(value, unit) for value in values]
        if name + OF in places:
            wholes = [_cell(row[places[name + OF]], unit) for row in rows]
            cells = [
                Cell(fraction(part.text, whole.text)) if value is not None else part
                for value, part, whole in zip(values, cells, wholes, strict=True)
            ]
        columns.append(Column(escape(heading(name)), cells, _numeric(values), unit == "at"))
    return columns


def _table_columns(item: Item) -> list[Column]:
    """The columns of a table.

    Raises:
        KeyError, TypeError, ValueError, IndexError: the item is not a table.
    """
    names, rows = [str(name) for name in item["columns"]], item["rows"]
    if not item.get("verbatim") and len(set(names)) == len(names):
        return _columns(names, rows)
    marks = {(row, column): _MARKS[mark] for row, column, mark in item.get("marks", ())}
    columns = []
    for index, name in enumerate(names):
        values = [row[index] for row in rows]
        cells = [
            Cell(_cell(value).text, *marks.get((number, index), ("", "")))
            for number, value in enumerate(values)
        ]
        columns.append(Column(escape(name), cells, _numeric(values)))
    return columns


def _numeric(values: Sequence[Any]) -> bool:
    there = [value for value in values if value is not None]
    return bool(there) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in there
    )


def _cell(value: Any, unit: Unit = "") -> Cell:
    if value is None:
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int | float | str):
        text = shown(value, unit)
        return Cell(escape(text), "yellow" if unit == "days" and text.endswith("!") else "")
    return Cell(escape(json.dumps(value)))


def _wrapped(text: str, console: Console) -> str:
    """Lines of a text, wrapped at words on a terminal."""
    if not console.is_terminal:
        return text
    return "\n".join(paragraph(line, console.width) for line in text.split("\n"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
