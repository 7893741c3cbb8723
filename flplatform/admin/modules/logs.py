"""`logs`: the lines of a run from server and sites in one stream, once or live."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from flplatform.admin.modules.hosts import Hosts, write_row
from flplatform.admin.modules.log_reading import Reading, Sheet, Times
from flplatform.admin.ports import Control
from flplatform.core.control import RunView
from flplatform.core.errors import NotFoundError
from flplatform.core.logs import DEFAULT_LINES, LogsWanted, earliest
from flplatform.hci import CommandSpec, Connection, ExitCode, argument, did_you_mean


@dataclass(frozen=True)
class LogsArguments:
    """Of `logs`."""

    run: int = argument(help="the run's number", complete="run", minimum=1)
    sites: tuple[str, ...] = argument(
        help="only these sites; default the server and all sites of the run",
        complete="site",
        metavar="SITE",
        rest=True,
        default=(),
    )
    follow: bool = argument(
        help="go on until the run has ended, or Ctrl-C", option="--follow -f", default=False
    )
    lines: int = argument(
        help="latest lines of each source",
        option="--lines -n",
        metavar="N",
        minimum=0,
        default=DEFAULT_LINES,
    )
    since: str = argument(
        help="only from then on: 90s, 10m, 2h, 1d ago, or an ISO time (UTC)",
        option="--since",
        metavar="TIME",
        default="",
    )
    grep: str = argument(
        help="only lines that hold this text", option="--grep", metavar="TEXT", default=""
    )
    server: bool = argument(
        help="the server's lines: only these, or besides those of the sites named",
        option="--server",
        default=False,
    )

    def __post_init__(self) -> None:
        earliest(self.since, datetime.now(UTC))

    @property
    def wanted(self) -> LogsWanted:
        """The same as sites read it from the signed words."""
        return LogsWanted(**asdict(self))


class LogsModule:
    """Logs of runs.

    Args:
        control: has the server's lines and takes the sites'.
        hosts: carries the command to the sites.
        times: how long to wait for what, while a log is followed.
    """

    name = "system"
    summary = "server and sites as machines"

    def __init__(self, control: Control, hosts: Hosts, times: Times | None = None) -> None:
        self._control = control
        self._hosts = hosts
        self._times = times or Times()

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="logs",
                summary="shows what a run has logged at server and sites, merged; -f follows it",
                arguments=LogsArguments,
                handler=self._logs,
                permission="view",
                mutating=False,
                examples=(
                    "logs 3",
                    "logs -f 3",
                    "logs 3 hospital-a --since 10m --grep loss",
                    "logs 3 --server --lines 20",
                ),
                states="before, while and after a run is active",
            )
        ]

    async def _logs(self, connection: Connection, args: LogsArguments) -> None:
        run = self._control.run(args.run)
        sites = await self._sites_of(connection, run, args.sites) if args.wanted.reaches_any else []
        if not (sites or args.wanted.server_too):
            return
        feed = None
        if args.follow and not run.ended:
            feed = self._control.logs.follow(run.run, sites)
        sheet = Sheet(connection)
        reading = Reading(self._control, self._hosts, args.wanted, sheet, feed, self._times)
        try:
            await reading.first(sites)
            if feed is not None:
                await reading.rest(feed)
        finally:
            if feed is not None:
                feed.close()
        await sheet.finish()
        for site, problem in reading.problems.items():
            await write_row(connection, site, problem)
        if reading.problems and len(reading.problems) < len(sites) + args.wanted.server_too:
            connection.exit_code = ExitCode.FAILED  # not `refused`: others have answered
        await self._show_failure(connection, run.run)

    async def _sites_of(
        self, connection: Connection, run: RunView, named: Iterable[str]
    ) -> list[str]:
        """Return whom to ask; write a row for each site that has no part in the run."""
        chosen = []
        for site in dict.fromkeys(named or run.targets):
            if site not in run.targets:
                near = did_you_mean(site, run.targets)
                what = f"site of run {run.run}{near and f' ({near})'}"
                await connection.failed(site, NotFoundError(what))
            elif run.answers.get(site, "").startswith("declined"):
                await connection.row(site, detail=f"declined run {run.run}, so it has no log")
            else:
                chosen.append(site)
        return chosen

    async def _show_failure(self, connection: Connection, run: int) -> None:
        """End with what failed the run, and where."""
        failure = self._control.logs.failure(run)
        if failure is None:
            return
        await connection.data("failure", asdict(failure))
        reason = self._control.run(run).reason
        lines = [
            f"run {run} failed: {reason}",
            f"at {failure.site}, in task {failure.task_id}: {failure.error}",
        ]
        await connection.text("\n".join([*lines, *failure.traceback.splitlines()]))
