"""`pwd ls cat head tail grep env`, built in: no process is started, nothing outside is reached.

The same function carries them out on server and sites, as `shell_words` has read them. Every
answer is bounded: 1 MiB as JSON, 10 seconds.
"""

import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from flplatform import __version__
from flplatform.core.errors import InvalidArgumentError
from flplatform.files.linear_regex import LinearPattern
from flplatform.files.names import check_path
from flplatform.files.shell_words import Look
from flplatform.files.tree import Entry, Tree

MAX_OUTPUT = (1 << 20) - 4096
"""Bytes of an answer, counted as JSON: a reply of a site may have 1 MiB in all."""

DEADLINE_S = 10.0
MAX_LINE_BYTES = 64 << 10
"""A longer line counts as several."""

MAX_ENTRIES = 10_000
MAX_DEPTH = 32
_STEP = 64 << 10

VARIABLES: Final = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "FLP_LOG_LEVEL",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "MKL_NUM_THREADS",
        "NVIDIA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "TZ",
    }
)
"""The only variables of its environment that a host tells."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a command shows; `cut` says why there is no more, empty if that is all."""

    text: str
    cut: str = ""

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return self.text.count("\n") + (1 if self.text and not self.text.endswith("\n") else 0)


def run(
    look: Look,
    tree: Tree,
    settings: Mapping[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> Shown:
    """Carry a command out; it blocks for up to 10 seconds.

    Args:
        look: the command.
        tree: what it may see.
        settings: what `env` shows besides the harmless variables.
        clock: seconds.

    Raises:
        FLError: the path is not there, is refused, or the pattern is not understood.
        OSError: it cannot be read.
    """
    page = _Page(clock)
    try:
        _COMMANDS[look.command](look, tree, settings, page)
    except _Cut as cut:
        return Shown("".join(page.lines), str(cut))
    return Shown("".join(page.lines))


def settings(project: str, name: str) -> dict[str, str]:
    """Return what `env` shows of a host of the platform."""
    return {
        "FLP_NAME": name,
        "FLP_PROJECT": project,
        "FLP_PYTHON": platform.python_version(),
        "FLP_VERSION": __version__,
    }


class _Cut(Exception):  # noqa: N818 - not an error: the answer is as long as it may be
    """The answer is cut; the text says why."""


class _Page:
    """Collects an answer within its bounds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lines: list[str] = []
        self._room = MAX_OUTPUT
        self._clock = clock
        self._until = clock() + DEADLINE_S

    def check(self) -> None:
        """Stop if the time is up."""
        if self._clock() > self._until:
            raise _Cut(f"cut after {DEADLINE_S:g} s")

    def add(self, line: str) -> None:
        """Add text, its line end included."""
        size = len(json.dumps(line)) - 2
        if size > self._room:
            raise _Cut(f"cut at {MAX_OUTPUT} bytes")
        self._room -= size
        self.lines.append(line)

    def add_end(self, lines: list[str], cut: bool) -> None:
        """Add the last ones of some lines; `cut` says that some are missing already."""
        fitting: list[str] = []
        for line in reversed(lines):
            self._room -= len(json.dumps(line)) - 2
            if self._room < 0:
                break
            fitting.append(line)
        self.lines.extend(reversed(fitting))
        if cut or len(fitting) < len(lines):
            raise _Cut(f"only the last lines, {MAX_OUTPUT} bytes at most")


def _pwd(_look: Look, _tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    page.add("/\n")


def _env(_look: Look, _tree: Tree, settings: Mapping[str, str], page: _Page) -> None:
    told = {name: value for name, value in os.environ.items() if name in VARIABLES}
    for name, value in sorted({**told, **settings}.items()):
        page.add(f"{name}={_one_line(value)}\n")


# ---- listing ----


def _ls(look: Look, tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    waiting = [(look.path, 0)]
    left = MAX_ENTRIES
    while waiting:
        path, depth = waiting.pop()
        entries: list[Entry] = []
        for entry in tree.entries(path):
            page.check()
            left -= 1
            if left < 0:
                raise _Cut(f"cut after {MAX_ENTRIES} entries")
            if "a" in look.options or not entry.name.startswith("."):
                entries.append(entry)
        _sort(entries, look.options)
        if "R" in look.options:
            page.add(f"{'' if path == look.path else chr(10)}{path or '/'}:\n")
        for entry in entries:
            page.add(_listed(entry, look.options))
        if "R" in look.options and depth < MAX_DEPTH:
            folders = [entry.name for entry in entries if entry.is_folder and _can_open(entry.name)]
            inner = [f"{path}/{name}" if path else name for name in folders]
            waiting.extend((each, depth + 1) for each in reversed(inner))


def _can_open(name: str) -> bool:
    try:
        check_path(name)
    except InvalidArgumentError:
        return False
    return True


def _sort(entries: list[Entry], options: Mapping[str, str]) -> None:
    entries.sort(key=lambda entry: entry.name)
    if "S" in options:
        entries.sort(key=lambda entry: -(entry.status.st_size if entry.status else 0))
    elif "t" in options or "u" in options:
        entries.sort(key=lambda entry: -_time(entry, options))
    if "r" in options:
        entries.reverse()


def _time(entry: Entry, options: Mapping[str, str]) -> float:
    if entry.status is None:
        return 0.0
    return entry.status.st_atime if "u" in options else entry.status.st_mtime


def _listed(entry: Entry, options: Mapping[str, str]) -> str:
    status = entry.status
    link = status is not None and stat.S_ISLNK(status.st_mode)
    mark = "/" if entry.is_folder else "@" if link else ""
    name = _one_line(os.fsencode(entry.name).decode(errors="replace")) + mark
    if "l" not in options:
        return f"{name}\n"
    if status is None:
        return f"{'d---------':10} {0:>12} {'-':20} {name}\n"
    when = datetime.fromtimestamp(_time(entry, options), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{stat.filemode(status.st_mode)} {status.st_size:>12} {when} {name}\n"


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


# ---- reading ----


def _chunks(handle: int, page: _Page) -> Iterator[bytes]:
    while True:
        page.check()
        chunk = os.read(handle, _STEP)
        if not chunk:
            return
        yield chunk


def _lines(handle: int, page: _Page) -> Iterator[tuple[int, str]]:
    """Yield byte offset and text of each line, without its end."""
    offset, rest = 0, b""
    for chunk in _chunks(handle, page):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield from _pieces(offset, line)
            offset += len(line) + 1
        while len(rest) > MAX_LINE_BYTES:
            piece, rest = rest[:MAX_LINE_BYTES], rest[MAX_LINE_BYTES:]
            yield offset, piece.decode(errors="replace")
            offset += len(piece)
    if rest:
        yield offset, rest.decode(errors="replace")


def _pieces(offset: int, line: bytes) -> Iterator[tuple[int, str]]:
    for start in range(0, max(len(line), 1), MAX_LINE_BYTES):
        yield offset + start, line[start : start + MAX_LINE_BYTES].decode(errors="replace")


def _cat(look: Look, tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    options = look.options
    number, blank = 0, False
    with tree.file(look.path) as handle:
        for _, line in _lines(handle, page):
            if "s" in options and blank and not line:
                continue
            blank = not line
            shown = line.replace("\t", "^I") if "T" in options else line
            if "b" in options:
                number += bool(line)
                shown = f"{number:>6}  {shown}" if line else shown
            elif "n" in options:
                number += 1
                shown = f"{number:>6}  {shown}"
            page.add(f"{shown}\n")


def _head(look: Look, tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    with tree.file(look.path) as handle:
        if "c" in look.options:
            wanted = min(int(look.options["c"]), MAX_OUTPUT)
            data = b""
            while len(data) < wanted and (chunk := os.read(handle, wanted - len(data))):
                data += chunk
            for line in _texts(data):
                page.add(line)
            return
        left = int(look.options.get("n", "10"))
        for _, line in _lines(handle, page) if left else ():
            page.add(f"{line}\n")
            left -= 1
            if not left:
                return


def _tail(look: Look, tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    with tree.file(look.path) as handle:
        size = os.fstat(handle).st_size
        wanted = int(look.options.get("c", size))
        begin = max(size - min(wanted, MAX_OUTPUT), 0)
        data = os.pread(handle, size - begin, begin)
    if "c" in look.options:
        page.add_end(_texts(data), wanted > MAX_OUTPUT and begin > 0)
        return
    count = int(look.options.get("n", "10"))
    # The end of the last line is no line of its own; the first one may have lost its beginning.
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    short = begin > 0 and len(lines) <= count
    lines = (lines[1:] if short else lines[-count:]) if count else []
    page.add_end([line.decode(errors="replace") + "\n" for line in lines], short)


def _texts(data: bytes) -> list[str]:
    return data.decode(errors="replace").splitlines(keepends=True)


def _grep(look: Look, tree: Tree, _settings: Mapping[str, str], page: _Page) -> None:
    matches = _matcher(look)
    options = look.options
    count = 0
    with tree.file(look.path) as handle:
        for number, (offset, line) in enumerate(_lines(handle, page), start=1):
            if matches(line) == ("v" in options):
                continue
            count += 1
            if "c" not in options:
                place = f"{number}:" if "n" in options else ""
                place += f"{offset}:" if "b" in options else ""
                page.add(f"{place}{line}\n")
    if "c" in options:
        page.add(f"{count}\n")


def _matcher(look: Look) -> Callable[[str], bool]:
    ignore_case = "i" in look.options
    if "E" in look.options:
        return LinearPattern(look.pattern, ignore_case).search
    wanted = look.pattern.lower() if ignore_case else look.pattern
    return lambda line: wanted in (line.lower() if ignore_case else line)


_COMMANDS: Final[Mapping[str, Callable[[Look, Tree, Mapping[str, str], _Page], None]]] = {
    "pwd": _pwd,
    "ls": _ls,
    "cat": _cat,
    "head": _head,
    "tail": _tail,
    "grep": _grep,
    "env": _env,
}
