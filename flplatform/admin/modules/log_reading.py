"""Reads a run's log from server and sites: what there is, merged, and then what comes."""

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from flplatform.admin.modules.hosts import Hosts, absence, refusal
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.core.control import SiteReply
from flplatform.core.logs import (
    MAX_FOLLOW_S,
    SERVER,
    LogFeed,
    LogLine,
    LogNews,
    LogsWanted,
    SiteLines,
    earliest,
    records,
    stamp,
)
from flplatform.hci import Connection

ITEM_CHARS = 32 << 10
MAX_DATA_LINES = 1000
MAX_DATA_CHARS = 192 << 10
"""Of the lines in the JSON answer, the latest."""

AGAIN = "log ended, give the command again"
LOST = "not connected; its lines go on when it is back"


@dataclass(frozen=True, slots=True)
class Times:
    """How long to wait for what, in seconds.

    Attributes:
        drain_s: the sites' last lines may come so long after the end of the run.
        doubt_s: a site that registered anew and sends nothing for so long has been restarted.
        follow_s: a log is followed for so long.
        look_s: pause between two looks at who is there.
    """

    drain_s: float = 4.0
    doubt_s: float = 10.0
    follow_s: float = MAX_FOLLOW_S
    look_s: float = 1.0


class Sheet:
    """What has been shown: text as it comes, and the latest of it for the JSON answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._kept: deque[LogLine] = deque()
        self._chars = 0

    async def show(self, lines: Iterable[LogLine]) -> None:
        """Show lines, many in one item."""
        texts: list[str] = []
        size = 0
        for line in lines:
            self._keep(line)
            texts.append(str(line))
            size += len(texts[-1])
            if size > ITEM_CHARS:
                await self._connection.text("\n".join(texts))
                texts, size = [], 0
        if texts:
            await self._connection.text("\n".join(texts))

    async def finish(self) -> None:
        """Send the machine-readable lines."""
        await self._connection.data("logs", [asdict(line) for line in self._kept])

    def _keep(self, line: LogLine) -> None:
        self._kept.append(line)
        self._chars += len(line.text) + 100
        while len(self._kept) > MAX_DATA_LINES or (
            self._chars > MAX_DATA_CHARS and len(self._kept) > 1
        ):
            self._chars -= len(self._kept.popleft().text) + 100


class Reading:
    """One reading of a run's log: first what there is, then, if followed, what comes.

    Args:
        control: sees the sites.
        hosts: carries the command in hand to them, again after a restart while it is fresh.
        wanted: what the command asks for.
        sheet: takes the lines.
        feed: brings the live ones; None to read once.
        times: how long to wait for what.

    Attributes:
        problems: site -> why its lines are missing.
    """

    def __init__(
        self,
        control: Control,
        hosts: Hosts,
        wanted: LogsWanted,
        sheet: Sheet,
        feed: LogFeed | None,
        times: Times,
    ) -> None:
        self.problems: dict[str, SiteReply] = {}
        self._control = control
        self._hosts = hosts
        self._wanted = wanted
        self._sheet = sheet
        self._feed = feed
        self._times = times
        self._open: set[str] = set()  # sites whose lines may still come
        self._away: set[str] = set()  # those of them that are not connected
        self._doubts: dict[str, float] = {}  # returned site -> until when it is believed
        self._last: dict[str, tuple[str, int]] = {}  # site -> time of its last lines, how many
        self._clock = asyncio.get_running_loop().time

    async def first(self, sites: Sequence[str]) -> None:
        """Show what there is, merged by time."""
        sources = [self._of_server()] if self._wanted.server_too else []
        there = []
        for site in sites:
            if self._connected(site):
                there.append(site)
            else:
                self._miss(site)
        for site, reply in (await self._ask(there)).items():
            answer = self._take(site, reply)
            if answer.cut:
                note = "earlier lines are left out: too much for one answer"
                sources.append([_remark(site, note, answer.lines[0].time if answer.lines else "")])
            sources.append(answer.lines)
            self._note_last(answer.lines)
        await self._sheet.show(_merged(sources))
        if self._feed is not None:  # once it has ended is too late to say it
            for site, problem in self.problems.items():
                await self._remark(site, refusal(problem))

    async def rest(self, feed: LogFeed) -> None:
        """Show what comes until the run has ended and the sites have said so, or time is over."""
        until = self._clock() + self._times.follow_s
        drained: float | None = None
        while True:
            news = await feed.news(self._times.look_s)
            await self._sheet.show(self._admitted(news))
            if not news.run_over:
                await self._watch(news)
            self._open -= news.ended
            now = self._clock()
            if news.run_over:
                drained = drained or now + self._times.drain_s
                if not self._open - self._away or now > drained:
                    break
            elif now > until:
                await self._remark(SERVER, AGAIN)
                break

    def _of_server(self) -> list[LogLine]:
        since = earliest(self._wanted.since, datetime.now(UTC))
        lines = [
            line
            for line in self._control.logs.of_run(self._wanted.run)
            if line.time >= since and self._wanted.grep in line.text
        ]
        return lines[len(lines) - min(self._wanted.lines, len(lines)) :]

    def _admitted(self, news: LogNews) -> list[LogLine]:
        """Pick the lines to show; sites have picked theirs, but for remarks about the log."""
        self._note_last(line for line in news.lines if line.source != SERVER)
        wanted = self._wanted
        return [
            line
            for line in news.lines
            if line.source != SERVER or (wanted.server_too and wanted.grep in line.text)
        ]

    # ---- sites ----

    def _connected(self, site: str) -> bool:
        view = next((each for each in self._control.sites() if each.name == site), None)
        return view is not None and view.certificate_days is not None

    async def _ask(self, sites: Sequence[str], after: str = "") -> dict[str, SiteReply]:
        body = {"subscription": self._feed.id if self._feed else "", "after": after}
        return await self._hosts.ask(sites, body) if sites else {}

    def _take(self, site: str, reply: SiteReply) -> SiteLines:
        """Read a site's answer and note whether lines of it will follow."""
        if reply.status != "ok":
            self.problems[site] = reply
            self._open.discard(site)
            return SiteLines()
        answer = SiteLines.of(site, reply.body)
        self.problems.pop(site, None)
        self._away.discard(site)
        if answer.following:
            self._open.add(site)
        return answer

    def _miss(self, site: str) -> None:
        view = next((each for each in self._control.sites() if each.name == site), None)
        message = f"not connected: {absence(view)}"
        self.problems[site] = SiteReply("error", message=message)
        if self._feed is not None:
            self._away.add(site)
            self._open.add(site)

    async def _watch(self, news: LogNews) -> None:
        """See who is gone, who is back, and who has forgotten that it is asked."""
        for site in news.ended & self._open:
            self._lose(site)
            await self._remark(site, AGAIN)
        for site in sorted(self._open - self._away):
            if not self._connected(site):
                self._miss(site)
                await self._remark(site, LOST)
        for site in news.heard - news.ended:
            self._doubts.pop(site, None)
            if site in self._away:
                self._away.discard(site)
                self.problems.pop(site, None)
        for site in sorted(news.returned & self._open):
            await self._again(site)
        for site, until in list(self._doubts.items()):
            if self._clock() > until:
                self._lose(site)
                await self._remark(site, AGAIN)

    async def _again(self, site: str) -> None:
        """Ask a site anew that may have been restarted; an order that is stale asks nobody."""
        if ordered().order.not_after <= datetime.now(UTC):
            self._doubts[site] = self._clock() + self._times.doubt_s
            return
        time, count = self._last.get(site, ("", 0))
        reply = (await self._ask([site], time))[site]
        answer = self._take(site, reply)
        if site not in self._open:
            self._lose(site)
            await self._remark(site, AGAIN)
            return
        lines = answer.lines
        while lines and count and lines[0].time == time:  # it has sent these before
            lines, count = lines[1:], count - 1
        self._note_last(lines)
        await self._sheet.show(lines)

    def _lose(self, site: str) -> None:
        self._open.discard(site)
        self._away.discard(site)
        self._doubts.pop(site, None)
        if self.problems.get(site, SiteReply("ok")).status != "refused":
            self.problems[site] = SiteReply("error", message=AGAIN)

    async def _remark(self, site: str, text: str) -> None:
        await self._sheet.show([_remark(site, text)])

    def _note_last(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            if line.who != "log":
                time, count = self._last.get(line.source, ("", 0))
                self._last[line.source] = line.time, count + 1 if line.time == time else 1


def _remark(source: str, text: str, time: str = "") -> LogLine:
    return LogLine(time or stamp(datetime.now(UTC)), source, "log", text)


def _merged(sources: Iterable[Sequence[LogLine]]) -> list[LogLine]:
    """Merge by time; the order within a source stays, and so does a record's wholeness."""
    grouped = [list(records(lines)) for lines in sources]
    merged = heapq.merge(*grouped, key=lambda group: group[0].time)
    return [line for group in merged for line in group]
