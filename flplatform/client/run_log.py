"""A run's log at its site: what the job's code prints, and what its parent has to say of it."""

import contextlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeAlias

from flplatform.core.logs import stamp

MAX_BYTES = 10 << 20
MAX_LINE_BYTES = 8 << 10
TAIL_LINES = 40
BLOCK_BYTES = 1 << 16
_PRINTABLE = {code: "?" for code in (*range(32), *range(127, 160)) if code != ord("\t")}

Listener: TypeAlias = Callable[[str, str, Sequence[str]], None]
"""(time, who, texts): hears of lines as they are written, on the event loop."""

Entry: TypeAlias = tuple[str, str, str]
"""Time, who and text of a line."""


class RunLog:
    """Lines with a time and who speaks, in a file and at most one older one.

    A full disk loses lines and stops nobody; how much was lost is said once there is space.

    Args:
        path: the file; the older one has `.1` at its end.
        max_bytes: size at which a new file is begun.
        on_lines: hears of every line, also of those that the disk does not take.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int = MAX_BYTES,
        on_lines: Listener = lambda *_: None,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._on_lines = on_lines
        self._partial = b""
        self._lost = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._file = self._open()

    @property
    def tail(self) -> str:
        """The last lines that the job's code printed."""
        return "\n".join(self._tail)

    def feed(self, output: bytes) -> None:
        """Take output of the job's code, in pieces of any length; control characters go."""
        lines = (self._partial + output).split(b"\n")
        self._partial = lines.pop()
        while len(self._partial) >= MAX_LINE_BYTES:
            lines.append(self._partial[:MAX_LINE_BYTES])
            self._partial = self._partial[MAX_LINE_BYTES:]
        pieces = (
            line[start : start + MAX_LINE_BYTES]
            for line in lines
            for start in range(0, max(len(line), 1), MAX_LINE_BYTES)
        )
        texts = [_clean(piece) for piece in pieces]
        self._tail.extend(texts[-TAIL_LINES:])
        self._write("job", texts)

    def note(self, text: str) -> None:
        """Write a line of the platform's own, unless the log is closed."""
        self._write("run", [text])

    def close(self) -> None:
        """Write what is left of the last line and close the file."""
        if self._partial:
            self.feed(b"\n")
        self._file.close()

    def _write(self, who: str, lines: list[str]) -> None:
        if self._file.closed:
            return
        now = stamp(datetime.now(UTC))
        if self._lost:
            lines = [f"{self._lost} lines lost: the disk was full", *lines]
        data = "".join(f"{now} {who} | {line}\n" for line in lines).encode(errors="replace")
        try:
            if self._file.tell() + len(data) > self._max_bytes and self._file.tell():
                os.replace(self._path, f"{self._path}.1")
                fresh = self._open()
                self._file.close()
                self._file = fresh
            self._file.write(data)
            self._lost = 0
        except OSError:
            self._lost += len(lines)
        self._on_lines(now, who, lines)

    def _open(self) -> io.FileIO:
        return io.FileIO(self._path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600))


def _clean(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace").translate(_PRINTABLE)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a log: what was written before it is told from what comes after."""

    inode: int
    offset: int


def mark(path: Path) -> Mark | None:
    """Return where a log ends now; None if there is no log."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Mark(status.st_ino, status.st_size)


def tail(
    path: Path,
    end: Mark,
    *,
    lines: int,
    max_bytes: int,
    earliest: str = "",
    grep: str = "",
) -> tuple[list[Entry], bool]:
    """Read the last lines before `end`, from the end backwards; blocks, so not on the event loop.

    Args:
        path: the log; the older file beside it is read too.
        end: as `mark` returned it.
        lines: how many at most.
        max_bytes: of all of them together, encoded as JSON.
        earliest: none before this time.
        grep: only lines that hold this text.

    Returns:
        The lines, oldest first; whether some were left out for their size.

    Raises:
        OSError: the disk does not give them.
    """
    found: deque[Entry] = deque()
    left = max_bytes
    for raw in _backwards(path, end):
        if len(found) >= lines:
            break
        entry = _entry(raw)
        if entry is None:
            continue
        if entry[0] < earliest:
            break
        if grep in entry[2]:
            left -= len(json.dumps(entry)) + 2
            if left < 0:
                return list(found), True
            found.appendleft(entry)
    return list(found), False


def _entry(raw: bytes) -> Entry | None:
    """Read a line of the file; None for one that a full disk has cut."""
    head, bar, text = raw.decode(errors="replace").partition(" | ")
    time, _, who = head.partition(" ")
    return (time, who, text) if bar and who else None


def _backwards(path: Path, end: Mark) -> Iterator[bytes]:
    """Yield lines from `end` to the beginning of the older file, whichever of the two it is in."""
    with contextlib.ExitStack() as stack:
        files = []
        # The newer one first: if it takes the older one's place meanwhile, both are the same file.
        for each in (path, Path(f"{path}.1")):
            with contextlib.suppress(FileNotFoundError):
                files.append(stack.enter_context(each.open("rb")))
        inodes = [os.fstat(file.fileno()).st_ino for file in files]
        if end.inode not in inodes:
            return  # twice a new file was begun since
        first = inodes.index(end.inode)
        yield from _lines_before(files[first], end.offset)
        for file, inode in zip(files[first + 1 :], inodes[first + 1 :], strict=True):
            if inode != end.inode:
                yield from _lines_before(file, os.fstat(file.fileno()).st_size)


def _lines_before(file: BinaryIO, end: int) -> Iterator[bytes]:
    rest = b""
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        rest, *lines = (file.read(end - start) + rest).split(b"\n")
        yield from reversed(lines)
        end = start
    yield rest
