"""What the server lately refused to sites: bounded, in memory, for explanations."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from flplatform.core.errors import FLError, InvalidArgumentError
from flplatform.core.messages import TaskId
from flplatform.server.run_actor import utc_now

log = logging.getLogger(__name__)

MAX_KEPT = 10_000
MAX_CHARS = 500

OF_SPACE = ("disk", "reserve_bytes")
"""Rules of refusals that the operator of this server can do something about."""

TOLD_S = 60.0
"""They are told in the log, one in so many seconds."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The last refusal of a site.

    Attributes:
        time: UTC, ISO 8601.
        first: when the same was first refused, without another refusal in between.
        times: how often since then.
        what: the method, or the task.
        code: the error's stable code.
        run: the run of the task, if it was about one.
    """

    time: str
    first: str
    times: int
    site: str
    what: str
    code: str
    error: str
    rule: str
    run: int | None = None


class Refusals:
    """The last refusal of each site, and of each site in each run. Lives on the event loop.

    Args:
        now: the time in UTC, ISO 8601.
    """

    def __init__(self, now: Callable[[], str] = utc_now) -> None:
        self._now = now
        self._last: OrderedDict[tuple[str, int | None], Refusal] = OrderedDict()
        self._told = -TOLD_S

    def note(self, site: str, what: str, error: FLError) -> None:
        """Take in a refusal; `what` is a method's full name or a task's id."""
        run: int | None = None
        try:
            run = TaskId.parse(what).run
        except InvalidArgumentError:
            what = what.rpartition("/")[2]
        now = self._now()
        text = str(error)[:MAX_CHARS]
        if error.rule in OF_SPACE and time.monotonic() >= self._told + TOLD_S:
            self._told = time.monotonic()
            log.warning("%s: %s is refused for want of space here: %s", site, what, text)
        for key in {(site, None), (site, run)}:
            before = self._last.pop(key, None)
            again = before is not None and (before.what, before.error) == (what[:200], text)
            self._last[key] = Refusal(
                time=now,
                first=before.first if before and again else now,
                times=before.times + 1 if before and again else 1,
                site=site,
                what=what[:200],
                code=error.code,
                error=text,
                rule=error.rule,
                run=run,
            )
        while len(self._last) > MAX_KEPT:
            self._last.popitem(last=False)

    def last(self, site: str, run: int | None = None) -> Refusal | None:
        """Return the last refusal of a site, in a run or at all."""
        return self._last.get((site, run))
