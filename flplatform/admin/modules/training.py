"""Runs: list, choose, watch, steer and end them."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flplatform.admin import units, views
from flplatform.admin.ports import Control
from flplatform.admin.targets import RunArguments, current_run
from flplatform.core.control import RoundMetrics, RunView
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import CommandSpec, Connection, NoArguments, argument

EXIT_RUN_FAILED = 5
"""Exit code of a command whose run failed or was aborted."""

LOOK_S = 0.2
"""Shortest pause between two looks at a run that changes all the time."""

WHILE_ACTIVE = "while the run is active"


@dataclass(frozen=True)
class RunNumber:
    """Of `set_run_number`."""

    run: int = argument(help="the run's number", complete="run", minimum=1)


@dataclass(frozen=True)
class MinClients:
    """Of `set_min_clients`."""

    count: int = argument(help="updates that close a round", metavar="N", minimum=1)
    run: int | None = argument(
        help="the run's number; default the current one",
        option="--run",
        complete="run",
        metavar="RUN",
        minimum=1,
        default=None,
    )


class TrainingModule:
    """Runs.

    Args:
        control: sees and steers them.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control) -> None:
        self._control = control

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="list_runs",
                summary="lists all runs",
                arguments=NoArguments,
                handler=self._list_runs,
                permission="view",
                mutating=False,
                examples=("list_runs",),
            ),
            CommandSpec(
                name="set_run_number",
                summary="makes a run the session's current one",
                arguments=RunNumber,
                handler=self._set_run_number,
                permission="view",
                mutating=False,
                examples=("set_run_number 3",),
            ),
            CommandSpec(
                name="wait",
                summary="follows a run until it has ended; exit code 5 unless it finished",
                arguments=RunArguments,
                handler=self._wait,
                permission="view",
                mutating=False,
                examples=("wait 3", "wait"),
                local="wait",
            ),
            CommandSpec(
                name="abort",
                summary="ends a run; what it has published stays",
                arguments=RunArguments,
                handler=self._abort,
                permission="train",
                mutating=True,
                examples=("abort 3", "abort"),
                confirm=self._confirm_abort,
                states=WHILE_ACTIVE,
                survives_disconnect=True,
            ),
            CommandSpec(
                name="set_min_clients",
                summary="changes how many updates close a round",
                arguments=MinClients,
                handler=self._set_min_clients,
                permission="train",
                mutating=True,
                examples=("set_min_clients 3", "set_min_clients 3 --run 7"),
                states=WHILE_ACTIVE,
                survives_disconnect=True,
            ),
        ]

    async def _list_runs(self, connection: Connection, _: NoArguments) -> None:
        runs = self._control.runs()
        rows = [
            (
                run.run,
                run.name,
                run.status,
                f"{run.round}/{run.rounds}",
                run.submitter,
                units.moment(run.submitted),
                units.moment(run.ended) or None,
                run.reason or None,
            )
            for run in runs
        ]
        columns = ("run", "name", "status", "round", "submitter", "submitted", "ended", "reason")
        if rows:
            await connection.table("runs", columns, rows)
        else:
            await connection.text("no runs yet; submit_job starts one")
        await connection.data(
            "runs", [dict(zip(columns, map(asdict(run).get, columns), strict=True)) for run in runs]
        )

    async def _set_run_number(self, connection: Connection, args: RunNumber) -> None:
        run = self._control.run(args.run)
        await connection.text(f"run {run.run}: {run.name}, {run.status}")
        await connection.remember("run", run.run)

    async def _abort(self, connection: Connection, args: RunArguments) -> None:
        number = current_run(self._control, args.run)
        await self._control.abort(number, connection.session.user)
        await connection.row(f"run {number}", {"state": "aborted"})

    async def _confirm_abort(self, args: RunArguments) -> str:
        run = self._control.run(current_run(self._control, args.run))
        if run.ended:
            raise FailedPreconditionError(f"run {run.run} has {run.status}", rule="run ended")
        return (
            f"abort run {run.run}: round {run.round}, "
            f"{units.count(len(run.accepted), 'accepted update')} kept, "
            f"{units.count(len(run.waiting), 'site')} training. Continue?"
        )

    async def _set_min_clients(self, connection: Connection, args: MinClients) -> None:
        number = current_run(self._control, args.run)
        await self._control.set_min_clients(number, args.count, connection.session.user)
        await connection.row(f"run {number}", {"min_clients": args.count})

    async def _wait(self, connection: Connection, args: RunArguments) -> None:
        number = current_run(self._control, args.run)
        story, seen = Story(), 0
        while True:
            run = self._control.run(number)
            for line in story.news(run, self._control.metrics(number)):
                await connection.text(line)
            if run.ended:
                break
            await asyncio.sleep(LOOK_S)
            seen = await self._control.wait_changed(number, seen)
        await connection.data("run", views.of_run(run))
        if run.status != "finished":
            connection.exit_code = EXIT_RUN_FAILED


class Story:
    """Tells what has happened to a run since the last look, one line per event."""

    def __init__(self) -> None:
        self._told: set[tuple[str, object]] = set()

    def news(self, run: RunView, rounds: Sequence[RoundMetrics]) -> list[str]:
        """Return the lines that have not been told yet."""
        news = {key: line for key, line in _lines(run, rounds) if key not in self._told}
        self._told.update(news)
        return list(news.values())


def _lines(
    run: RunView, rounds: Sequence[RoundMetrics]
) -> Iterator[tuple[tuple[str, object], str]]:
    """All that has happened, each with a key of its own."""
    for site, answer in run.answers.items():
        if answer not in ("ok", "…"):
            yield ("answer", site), f"{site} {answer}"
    best: float | None = None
    for each in rounds:
        if each.closed:
            late = f", without {', '.join(each.stragglers)}" if each.stragglers else ""
            line = f"round {each.round}/{run.rounds} closed: {each.closed}{late}"
            yield ("closed", each.round), line
        if each.score is not None:
            better = best is None or (each.score > best if run.mode == "max" else each.score < best)
            best = each.score if better else best
            line = f"model {each.round}: {run.metric} {units.score(each.score)}"
            yield ("score", each.round), f"{line}, the best so far" if better else line
    reason = f": {run.reason}" if run.reason else ""
    yield ("status", run.status), f"run {run.run} {run.status}{reason}"
