"""A run's log at its site: what the job's code prints, and what its parent has to say of it."""

import io
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

MAX_BYTES = 10 << 20
MAX_LINE_BYTES = 8 << 10
TAIL_LINES = 40
_PRINTABLE = {code: "?" for code in (*range(32), *range(127, 160)) if code != ord("\t")}


class RunLog:
    """Lines with a time and who speaks, in a file and at most one older one.

    A full disk loses lines and stops nobody; how much was lost is said once there is space.

    Args:
        path: the file; the older one has `.1` at its end.
        max_bytes: size at which a new file is begun.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
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
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
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

    def _open(self) -> io.FileIO:
        return io.FileIO(self._path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600))


def _clean(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace").translate(_PRINTABLE)
