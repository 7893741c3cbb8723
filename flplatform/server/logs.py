"""Logs of runs at the server: events in words, and the live lines that sites push.

What a site pushes counts only if an operator follows the log of a run and asked this very site.
Every site has room of its own: one that floods is told to wait, and drops and counts its lines.
"""

import asyncio
import json
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from flplatform.core import events as ev
from flplatform.core.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from flplatform.core.logs import SERVER, Failure, LogLine, LogNews, clean, line_of, stamp
from flplatform.server.run_actor import RunActor
from flplatform.server.wording import describe

MAX_FEEDS = 64
MAX_BATCH_BYTES = 512 << 10
MAX_WAITING_CHARS = 512 << 10
"""Of one site's lines that wait for one reader; beyond it no further batch is taken."""

MAX_TRACEBACK_LINES = 200
MAX_LIVES = 100


class RunLogs:
    """Implements `core.logs.LogsControl` and takes results of topic `logs`. On the event loop.

    Args:
        view: run → the run for reading, ended or not; raises NotFoundError.
    """

    topic = "logs"

    def __init__(self, view: Callable[[int], RunActor]) -> None:
        self._view = view
        self._feeds: dict[str, Feed] = {}

    def of_run(self, run: int) -> list[LogLine]:
        """Return the events of a run in words; a failed task's with its traceback.

        Raises:
            NotFoundError: no such run.
        """
        return list(_lines(self._view(run), 0))

    def failure(self, run: int) -> Failure | None:
        """Return what failed a run; None unless it has failed by a task.

        Raises:
            NotFoundError: no such run.
        """
        actor = self._view(run)
        if actor.state.ended is None or actor.state.ended.status != "failed":
            return None
        failed = [event for event in actor.events if isinstance(event, ev.TaskFailed)]
        if not failed:
            return None
        last = next((event for event in reversed(failed) if event.traceback), failed[-1])
        trace = "\n".join(_traceback(last.traceback))
        return Failure(last.site, last.task_id, clean(last.error), trace)

    def follow(self, run: int, sites: Sequence[str]) -> "Feed":
        """Begin to take the lines of a run: new events, and what these sites send.

        Raises:
            NotFoundError: no such run.
            ResourceExhaustedError: too many follow logs already.
        """
        if len(self._feeds) >= MAX_FEEDS:
            raise ResourceExhaustedError(
                f"{MAX_FEEDS} logs are being followed", rule="max_feeds", hint="try again later"
            )
        feed = Feed(self._view(run), frozenset(sites), lambda: self._feeds.pop(feed.id, None))
        self._feeds[feed.id] = feed
        return feed

    def process(self, site: str, body: bytes) -> None:
        """Take a batch of lines.

        Raises:
            NotFoundError: nobody listens, or nobody asked this site.
            InvalidArgumentError: it is no batch.
            ResourceExhaustedError: the reader is behind; try again later.
        """
        mine = [feed for feed in self._feeds.values() if site in feed.sites]
        if not mine:
            raise NotFoundError(f"nobody follows logs of {site}")
        if all(feed.full(site) for feed in mine):  # nothing is parsed that nobody would take
            raise ResourceExhaustedError("the reader of the log is behind", rule="log_reader")
        if len(body) > MAX_BATCH_BYTES:
            raise InvalidArgumentError(f"has {len(body)} bytes", field="body")
        try:
            batch: Any = json.loads(body)
            key, life, lines, ended = (
                batch[name] for name in ("subscription", "life", "lines", "ended")
            )
            number = batch["number"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InvalidArgumentError("is no batch of log lines", field="body") from None
        if not (
            isinstance(key, str)
            and isinstance(life, str)
            and isinstance(lines, list)
            and isinstance(ended, str)
            and type(number) is int
        ):
            raise InvalidArgumentError("is no batch of log lines", field="body")
        feed = self._feeds.get(key)
        if feed is None or site not in feed.sites:
            raise NotFoundError(f"nobody follows logs of {site}")
        if feed.full(site):
            raise ResourceExhaustedError("the reader of the log is behind", rule="log_reader")
        feed.take(site, (life[:32], number), lines, bool(ended))

    def returned(self, site: str) -> None:
        """Hear that a site has registered, perhaps as a new process."""
        for feed in self._feeds.values():
            feed.note_return(site)

    def changed(self) -> None:
        """Hear that some run has new events."""
        for feed in self._feeds.values():
            feed.wake()


class Feed:
    """The live lines of a run for one reader; implements `core.logs.LogFeed`.

    Args:
        actor: the run.
        sites: who may send.
        on_close: forgets the feed.

    Attributes:
        id: names the feed to its sites.
        sites: as given.
    """

    def __init__(
        self, actor: RunActor, sites: frozenset[str], on_close: Callable[[], object]
    ) -> None:
        self.id = secrets.token_hex(16)
        self.sites = sites
        self._actor = actor
        self._told = len(actor.events)
        self._on_close = on_close
        self._arrived = asyncio.Event()
        self._lines: deque[LogLine] = deque()
        self._waiting: Counter[str] = Counter()  # characters
        self._unreadable: Counter[str] = Counter()  # lines
        self._numbers: dict[str, dict[str, int]] = {}
        self._heard: set[str] = set()
        self._returned: set[str] = set()
        self._ended: set[str] = set()

    def full(self, site: str) -> bool:
        """Return whether the reader is so far behind that a site must wait."""
        return self._waiting[site] >= MAX_WAITING_CHARS

    def take(self, site: str, number: tuple[str, int], entries: list[Any], ended: bool) -> None:
        """Take a batch; one that came before, its answer lost, is taken once.

        Args:
            site: who sends it.
            number: which life of the subscription, and which batch of it.
            entries: the lines, unchecked.
            ended: whether it is the last.
        """
        life, count = number
        lives = self._numbers.setdefault(site, {})
        self._heard.add(site)
        if ended:
            self._ended.add(site)
        self._arrived.set()
        if count <= lives.get(life, 0) or (life not in lives and len(lives) >= MAX_LIVES):
            return
        lives[life] = count
        for entry in entries:
            line = line_of(site, entry)
            if line is None:
                self._unreadable[site] += 1
                continue
            self._lines.append(line)
            self._waiting[site] += len(line.text) + 100

    def note_return(self, site: str) -> None:
        """Hear that a site has registered."""
        if site in self.sites:
            self._returned.add(site)
            self._heard.discard(site)
            self._arrived.set()

    def wake(self) -> None:
        """Hear that some run has new events."""
        if len(self._actor.events) > self._told:
            self._arrived.set()

    async def news(self, timeout_s: float) -> LogNews:
        """Return what has come; wait for it, `timeout_s` at most."""
        if len(self._actor.events) == self._told:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                pass
        self._arrived.clear()
        for site, count in self._unreadable.items():
            text = f"… {count} unreadable lines dropped"
            self._lines.append(LogLine(stamp(datetime.now(UTC)), site, "log", text))
        self._unreadable.clear()
        events = list(_lines(self._actor, self._told))
        self._told = len(self._actor.events)
        lines, self._lines = self._lines, deque()
        self._waiting.clear()
        news = LogNews(
            lines=(*events, *lines),
            heard=frozenset(self._heard),
            returned=frozenset(self._returned),
            ended=frozenset(self._ended),
            run_over=self._actor.state.ended is not None,
        )
        self._heard, self._returned, self._ended = set(), set(), set()
        return news

    def close(self) -> None:
        """Take nothing more; the sites are told so when they next send."""
        self._on_close()


def _lines(actor: RunActor, after: int) -> Iterator[LogLine]:
    """Say the events of a run from the one with index `after` on."""
    for event, time in zip(actor.events[after:], actor.times[after:], strict=True):
        text = clean(describe(event))
        if isinstance(event, ev.TaskFailed) and event.traceback:
            text = "\n".join([text, *_traceback(event.traceback)])
        yield LogLine(time, SERVER, "event", text)


def _traceback(text: str) -> list[str]:
    """Return the last lines of a traceback, which name the error."""
    return [clean(line) for line in text.strip("\n").split("\n")[-MAX_TRACEBACK_LINES:]]
