"""Log lines of runs: what one is, which ones a command asks for, and the port that brings them.

The words of a signed `logs` command are read twice: by the console's grammar and, at each site, by
`LogsWanted.of`, which takes the same words to mean the same (a test holds them together).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from flplatform.core.errors import InvalidArgumentError

MAX_TEXT = 8 << 10
"""Characters of one line."""

DEFAULT_LINES = 200
"""Lines of each source that `logs` shows unless told otherwise."""

MAX_FOLLOW_S = 3600.0
"""A log is followed for so long; then the command must be given again."""

SERVER = "server"
"""The source of a run's events."""

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_WHO = re.compile(r"[a-z]{1,16}")
_AGO = re.compile(r"([0-9]{1,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HARMFUL = dict.fromkeys(
    {*range(32), *range(127, 160), 0x2028, 0x2029} - {ord("\t")}, "?"
)  # a line end in a line would forge the next one


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line, or one record of several lines that belong together.

    Attributes:
        time: when it was written by the clock of its source, UTC, ISO 8601 with milliseconds.
        source: `server`, or the site.
        who: `job` for what the job's code printed, `run` for its site's own remarks, `event` for
            the run's events, `log` for remarks about the log itself.
        text: without control characters, but for tabs and the line ends of a record.
    """

    time: str
    source: str
    who: str
    text: str

    def __str__(self) -> str:
        head = f"{self.time} {self.source} {self.who} | "
        return "\n".join(head + line for line in self.text.split("\n"))


def stamp(moment: datetime) -> str:
    """Return a time as log lines have it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clean(text: str) -> str:
    """Return one line of bounded length in which nothing forges another or steers a terminal."""
    return text[:MAX_TEXT].translate(_HARMFUL)


def line_of(source: str, entry: object) -> LogLine | None:
    """Read one line as a site reports it: [time, who, text]; None if it is none."""
    match entry:
        case [str(time), str(who), str(text)] if _TIME.fullmatch(time) and _WHO.fullmatch(who):
            return LogLine(time, source, who, clean(text))
        case _:
            return None


def records(lines: Sequence[LogLine]) -> Iterator[list[LogLine]]:
    """Group a source's lines into records that must stay together: tracebacks and what is indented.

    Each line that begins with a blank belongs to the one before it, and so does the first line
    after a traceback's frames, which names the error.
    """
    group: list[LogLine] = []
    trace = False
    for line in lines:
        follows = bool(group) and line.who == group[-1].who
        indented = line.text[:1] in (" ", "\t")
        if follows and (indented or trace):
            group.append(line)
            trace = trace and indented
        else:
            if group:
                yield group
            group = [line]
            trace = False
        trace = trace or line.text.startswith("Traceback (most recent call last)")
    if group:
        yield group


def earliest(since: str, now: datetime) -> str:
    """Return the time from which on lines are wanted; empty for all.

    Args:
        since: empty, `90s`, `10m`, `2h`, `1d` before `now`, or a time in ISO 8601, UTC unless it
            says otherwise.
        now: the present.

    Raises:
        ValueError: it is none of these.
    """
    if not since:
        return ""
    try:
        if ago := _AGO.fullmatch(since):
            return stamp(now - timedelta(seconds=int(ago[1]) * _UNIT_S[ago[2]]))
        moment = datetime.fromisoformat(since)
        return stamp(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        raise ValueError(f"{since[:60]!r} is not 90s, 10m, 2h, 1d or a time in ISO 8601") from None


@dataclass(frozen=True, slots=True)
class LogsWanted:
    """What a `logs` command asks for.

    Attributes:
        run: the run's number.
        sites: whose lines; none for those of all sites of the run.
        lines: how many of each source, the latest.
        since: as `earliest` takes it; relative to the clock of each source.
        grep: only lines that hold this text.
        follow: whether to go on until the run has ended.
        server: the server's lines: only these, or besides those of the sites named.
    """

    run: int
    sites: tuple[str, ...] = ()
    lines: int = DEFAULT_LINES
    since: str = ""
    grep: str = ""
    follow: bool = False
    server: bool = False

    @classmethod
    def of(cls, argv: Sequence[str]) -> "LogsWanted":
        """Read the words of a command, its name first.

        Raises:
            InvalidArgumentError: they are none.
        """
        given: dict[str, str] = {}
        free: list[str] = []
        words = iter(argv[1:])
        for word in words:
            if not word.startswith("-") or word == "-" or _NUMBER.fullmatch(word):
                free.append(word)
            elif word == "--":
                free.extend(words)
            else:
                name, equals, value = word.partition("=")
                field_name = _OPTIONS.get(name)
                if field_name is None or field_name in given:
                    raise InvalidArgumentError(f"{name[:60]!r} is no option here", field="logs")
                if field_name in _FLAGS:
                    value = "" if equals else "yes"
                elif not equals:
                    value = next(words, "")
                given[field_name] = value
        try:
            number, *sites = free
            wanted = cls(
                run=int(number),
                sites=tuple(sites),
                lines=int(given.get("lines", DEFAULT_LINES)),
                since=given.get("since", ""),
                grep=given.get("grep", ""),
                follow=bool(given.get("follow")),
                server=bool(given.get("server")),
            )
            earliest(wanted.since, _SOME_TIME)
        except ValueError as error:
            raise InvalidArgumentError(f"cannot be read: {error}", field="logs") from None
        if wanted.run < 1 or wanted.lines < 0:
            raise InvalidArgumentError("a number is too small", field="logs")
        return wanted

    @property
    def server_too(self) -> bool:
        """Whether the server's lines are wanted."""
        return self.server or not self.sites

    @property
    def reaches_any(self) -> bool:
        """Whether any site's lines are wanted."""
        return bool(self.sites) or not self.server

    def reaches(self, site: str) -> bool:
        """Return whether a site's lines are wanted."""
        return site in self.sites or (self.reaches_any and not self.sites)


_OPTIONS = {
    "--lines": "lines", "-n": "lines", "--since": "since", "--grep": "grep",
    "--follow": "follow", "-f": "follow", "--server": "server",
}  # fmt: skip
_FLAGS = ("follow", "server")
_SOME_TIME = datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Failure:
    """The task that failed last: where, why, and what its code raised."""

    site: str
    task_id: str
    error: str
    traceback: str


@dataclass(frozen=True, slots=True)
class LogNews:
    """What has come since the last look at a feed.

    Attributes:
        lines: in the order of arrival; those of a source in its own order.
        heard: sites that have sent something, if only that they are still there.
        returned: sites that have registered again: they may have been restarted.
        ended: sites that will send nothing more.
        run_over: whether the run has ended.
    """

    lines: tuple[LogLine, ...] = ()
    heard: frozenset[str] = frozenset()
    returned: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    run_over: bool = False


class LogFeed(Protocol):
    """The live lines of a run: the server's events, and what its sites push."""

    @property
    def id(self) -> str:
        """The subscription that the sites are told."""

    async def news(self, timeout_s: float) -> LogNews:
        """Return what has come; wait for it, `timeout_s` at most."""

    def close(self) -> None:
        """Take nothing more; the sites are told so when they next send."""


class LogsControl(Protocol):
    """Logs of runs, as far as the server has them."""

    def of_run(self, run: int) -> list[LogLine]:
        """Return the events of a run in words; a failed task's with its traceback.

        Raises:
            NotFoundError: no such run.
        """

    def failure(self, run: int) -> Failure | None:
        """Return what failed a run; None unless it has failed by a task.

        Raises:
            NotFoundError: no such run.
        """

    def follow(self, run: int, sites: Sequence[str]) -> LogFeed:
        """Begin to take the lines of a run: new events, and what these sites send.

        Raises:
            NotFoundError: no such run.
            ResourceExhaustedError: too many follow logs already.
        """


@dataclass(frozen=True, slots=True)
class SiteLines:
    """A site's answer to `logs`, checked: lines, and whether it goes on sending.

    Attributes:
        lines: the latest ones, oldest first.
        cut: whether older ones were left out for their size.
        following: whether it has begun, or goes on, to send new ones.
    """

    lines: list[LogLine] = field(default_factory=list)
    cut: bool = False
    following: bool = False

    @classmethod
    def of(cls, site: str, body: Mapping[str, Any]) -> "SiteLines":
        """Read an answer; what is no line in it is left out."""
        entries = body.get("lines")
        found = [line_of(site, entry) for entry in entries] if isinstance(entries, list) else []
        return cls(
            [line for line in found if line],
            body.get("cut") is True,
            body.get("following") is True,
        )
