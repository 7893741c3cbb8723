"""Refused calls in the audit: written beside the event loop, and what repeats is summed up.

Nothing bounds how often somebody calls who is refused, and a refusal waits for no record of it.
The first one of a caller, a method and a rule is recorded at once. Those that follow are counted,
and become one record an interval. Only counts wait for the disk: however slow or full it is, none
is lost, and the record that is written at last says how many there were and since when.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from flplatform.core.errors import FLError
from flplatform.core.ports import AuditSink

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Between two records of one caller, method and rule."""

MAX_KEYS = 1000
"""Callers, methods and rules that are counted apart; what comes beyond is counted as `OTHERS`."""

OTHERS = "(others)"
MAX_CHARS = 500

_Key = tuple[str, str, str]


@dataclass(slots=True)
class Refused:
    """Refused calls of one caller, method and rule that are not in the audit yet.

    Attributes:
        due: when they may be recorded, monotonic seconds.
        name: the caller's, `unknown` without a valid certificate.
        peer: the last call's, as is `reason`.
        first: when the first of them was refused, UTC, ISO 8601; `last` likewise.
    """

    key: _Key
    due: float
    name: str
    method: str
    peer: str = ""
    reason: str = ""
    times: int = 0
    first: str = ""
    last: str = ""


class Tally:
    """Counts refused calls until they are recorded. Bounded; for one thread at a time.

    Args:
        interval_s: between two records of one caller, method and rule.
        max_keys: how many of these are counted apart.
    """

    def __init__(self, interval_s: float, max_keys: int) -> None:
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._kept: dict[_Key, Refused] = {}

    @property
    def times(self) -> int:
        """How many refused calls wait to be recorded."""
        return sum(each.times for each in self._kept.values())

    def note(
        self, name: str, method: str, peer: str, error: FLError, now: float, at: str
    ) -> Refused:
        """Count a refused call; return it with those that wait with it."""
        text = str(error)[:MAX_CHARS]
        # Without a name the error tells whose certificate it was.
        key = (name or error.message[:MAX_CHARS], method, error.rule or error.code)
        name = name or "unknown"
        if key not in self._kept and len(self._kept) >= self._max_keys:
            text = f"{name}: {method}: {text}"
            key, name, method = (OTHERS, OTHERS, OTHERS), OTHERS, OTHERS
        kept = self._kept.setdefault(key, Refused(key, now, name, method))
        kept.first = kept.first if kept.times else at
        kept.times += 1
        kept.last, kept.peer, kept.reason = at, peer, text
        return kept

    def take(self, now: float) -> list[Refused]:
        """Return what is due to be recorded, and count anew; forget who has stopped calling."""
        taken = []
        for key, each in list(self._kept.items()):
            if each.due > now:
                continue
            if each.times:
                taken.append(replace(each))
                each.times, each.due = 0, now + self._interval_s
            else:
                del self._kept[key]
        return taken

    def put_back(self, taken: Iterable[Refused]) -> None:
        """Count what was just taken and could not be recorded with what has come since."""
        for each in taken:
            kept = self._kept[each.key]
            if not kept.times:
                kept.last, kept.peer, kept.reason = each.last, each.peer, each.reason
            kept.times += each.times
            kept.first = each.first

    def pause(self, now: float) -> float | None:
        """Return in how many seconds something is due; None if nothing is."""
        return min((max(0.0, each.due - now) for each in self._kept.values()), default=None)


class RefusedCalls:
    """Has refused calls audited by a thread of its own. `note` is for any thread.

    Args:
        audit: hears of them.
        interval_s: between two records of one caller, method and rule.
        max_keys: how many of these are counted apart.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        audit: AuditSink,
        interval_s: float = INTERVAL_S,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._audit = audit
        self._interval_s = interval_s
        self._clock = clock
        self._tally = Tally(interval_s, max_keys)
        self._turn = threading.Condition()  # never held over a write
        self._closing = False
        self._complained: float | None = None
        self._writer = threading.Thread(target=self._run, name="refused-calls", daemon=True)
        self._writer.start()

    def note(self, name: str, method: str, peer: str, error: FLError) -> None:
        """Have a refused call recorded soon; this does not wait for the disk.

        Args:
            name: the caller's, empty without a valid certificate.
            method: the full name of what was called.
            peer: network address.
            error: the refusal.
        """
        now, at = self._clock(), datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._turn:
            if self._tally.note(name, method, peer, error, now, at).due <= now:
                self._turn.notify()

    def close(self) -> None:
        """Record what waits, and end; nothing may be noted any more."""
        with self._turn:
            self._closing = True
            self._turn.notify()
        self._writer.join()
        if left := self._tally.times:
            log.error("%d refused calls are not in the audit", left)

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._turn:
                while not self._closing and (pause := self._tally.pause(self._clock())) != 0.0:
                    self._turn.wait(pause)
                closing = self._closing
                taken = self._tally.take(math.inf if closing else self._clock())
            self._write(taken)

    def _write(self, taken: list[Refused]) -> None:
        for done, each in enumerate(taken):
            try:
                self._audit.record(
                    {"name": each.name, "role": "", "peer": each.peer},
                    each.method,
                    "refused",
                    reason=each.reason,
                    details={"times": str(each.times), "first": each.first, "last": each.last},
                )
            except OSError as error:
                with self._turn:
                    self._tally.put_back(taken[done:])
                    waiting = self._tally.times
                self._complain(error, waiting)
                return
            except Exception:  # the next one may be another matter
                log.exception("%d refused calls of %s are not in the audit", each.times, each.name)
        if taken and self._complained is not None:
            self._complained = None
            log.warning("the audit can be written again: refused calls are recorded")

    def _complain(self, error: OSError, waiting: int) -> None:
        now = self._clock()
        if self._complained is None or now - self._complained >= self._interval_s:
            self._complained = now
            log.error("the audit cannot be written, %d refused calls wait: %s", waiting, error)
