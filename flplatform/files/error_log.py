"""What a process has logged as a warning or worse: counted, and the last few of it in words."""

import logging
import threading
import time
from collections import Counter, deque
from typing import Any

MAX_LOGGERS = 200
MAX_MESSAGES = 20
MAX_CHARS = 500
OTHERS = "(others)"


class ErrorLog(logging.Handler):
    """Counts records by level and logger and keeps the last messages. Thread-safe."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records = threading.Lock()
        self._start()

    @classmethod
    def installed(cls) -> "ErrorLog":
        """Return the one that hears of every record of this process; installed if need be."""
        root = logging.getLogger()
        for handler in root.handlers:
            if isinstance(handler, cls):
                return handler
        handler = cls()
        root.addHandler(handler)
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        """Count a record."""
        try:
            text = record.getMessage()
            if record.exc_info and (error := record.exc_info[1]) is not None:
                text += f" [{type(error).__name__}: {error}]"
        except Exception:  # noqa: BLE001 - a bad record must not end what logs it
            text = "(cannot be shown)"
        with self._records:
            self._take(record, text)

    def _take(self, record: logging.LogRecord, text: str) -> None:
        name = record.name
        if (record.levelname, name) not in self._counts and len(self._counts) >= MAX_LOGGERS:
            name = OTHERS
        self._counts[record.levelname, name] += 1
        self._last.append((record.created, record.levelname, record.name, text[:MAX_CHARS]))

    def reset(self) -> int:
        """Forget everything; return how many records that were."""
        with self._records:
            total = self._counts.total()
            self._start()
        return total

    def view(self) -> dict[str, Any]:
        """Return since when (POSIX seconds), counts and the last messages, JSON-able."""
        with self._records:
            counts = [[level, name, count] for (level, name), count in self._counts.most_common()]
            return {
                "since": self._since,
                "counts": counts,
                "last": [list(entry) for entry in self._last],
            }

    def _start(self) -> None:
        self._since = time.time()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._last: deque[tuple[float, str, str, str]] = deque(maxlen=MAX_MESSAGES)
