"""Runs: list, watch and steer them."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flplatform.admin import units, views
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import RunArguments, current_run
from flplatform.core.control import RoundMetrics, RunView
from flplatform.core.lifecycle import DELETED, WHILE_ACTIVE, demand_active
from flplatform.hci import SESSION_RIGHT, CommandSpec, Connection, argument

EXIT_RUN_FAILED = 5
"""Exit code of a command whose run failed or was aborted."""

LOOK_S = 0.2
"""Shortest pause between two looks at a run that changes all the time."""

MAX_TIMEOUT_S = 300.0
"""How long a session may have sites take to answer."""

COLUMNS = (
    *("run", "name", "status", "round", "round_of"),
    *("submitter", "submitted_at", "ended_at", "reason"),
)
KEYS = (
    *("run", "name", "status", "round", "rounds"),
    *("submitter", "submitted", "ended", "reason", "source_run"),
)


@dataclass(frozen=True)
class ListRuns:
    """Of `list_runs`."""

    status: (
        Literal[
            "prepared",
            "deploying",
            "training",
            "validating",
            "finished",
            "failed",
            "aborted",
            "deleted",
        ]
        | None
    ) = argument(help="only runs of this status", option="--status", default=None)
    user: str = argument(
        help="only runs that this user submitted", option="--user", metavar="NAME", default=""
    )
    last: int | None = argument(
        help="only the latest ones", option="--last", metavar="N", minimum=1, default=None
    )
    all: bool = argument(help="also deleted runs", option="--all", default=False)


@dataclass(frozen=True)
class Seconds:
    """Of `set_timeout`."""

    seconds: float = argument(help="0.1 to 300", metavar="SECONDS", minimum=0.1)

    def __post_init__(self) -> None:
        if self.seconds > MAX_TIMEOUT_S:
            raise ValueError(f"SECONDS is {self.seconds:g}, at most {MAX_TIMEOUT_S:g}")


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
        rights: decides who may see which of them.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, rights: Rights) -> None:
        self._control = control
        self._rights = rights

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="list_runs",
                summary="lists the runs that you may see",
                arguments=ListRuns,
                handler=self._list_runs,
                permission="view",
                mutating=False,
                examples=("list_runs", "list_runs --status finished --last 10", "list_runs --all"),
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
                transient=True,
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
            CommandSpec(
                name="set_timeout",
                summary="sets how long sites may take to answer commands of this session",
                arguments=Seconds,
                handler=self._set_timeout,
                permission=SESSION_RIGHT,
                mutating=False,
                examples=("set_timeout 10",),
            ),
        ]

    async def _list_runs(self, connection: Connection, args: ListRuns) -> None:
        runs = self._control.runs()
        if args.all or args.status == DELETED:
            runs = sorted([*runs, *self._control.lifecycle.deleted()], key=lambda run: run.run)
        runs = [run for run in runs if self._wanted(run, args)]
        runs = runs[-args.last :] if args.last else runs
        rows = [
            (
                run.run,
                run.name,
                run.status,
                run.round,
                run.rounds,
                run.submitter,
                run.submitted,
                run.ended or None,
                run.reason or None,
            )
            for run in runs
        ]
        if rows:
            await connection.table("runs", COLUMNS, rows)
        elif args == ListRuns():
            await connection.text("no runs yet; submit_job starts one")
        else:
            await connection.text("no such run")
        await connection.data("runs", [{key: getattr(run, key) for key in KEYS} for run in runs])

    def _wanted(self, run: RunView, args: ListRuns) -> bool:
        return (
            args.status in (None, run.status)
            and args.user in ("", run.submitter)
            and self._rights.may_see(ordered().signer, run)
        )

    async def _set_timeout(self, connection: Connection, args: Seconds) -> None:
        connection.session.reply_timeout_s = args.seconds
        await connection.text(
            f"sites have {args.seconds:g} s to answer the commands of this session"
        )
        await connection.data("timeout_s", args.seconds)

    async def _set_min_clients(self, connection: Connection, args: MinClients) -> None:
        number = current_run(self._control, args.run)
        demand_active(self._control.run(number), "set_min_clients")
        await self._control.set_min_clients(number, args.count, connection.session.user)
        await connection.row(f"run {number}", {"min_clients": args.count})

    async def _wait(self, connection: Connection, args: RunArguments) -> None:
        number = current_run(self._control, args.run)
        story, seen = Story(), 0
        while True:
            run = self._control.run(number)
            for line in story.news(run, self._control.metrics(number)):
                await connection.text(line)
            if run.source_run and run.tasks:
                await connection.progress(f"run {number}", run.settled, run.tasks, "cells")
            if run.ended:
                break
            await asyncio.sleep(LOOK_S)
            seen = await self._control.wait_changed(number, seen)
        await connection.data("run", views.of_run(run))
        if run.status == "failed":
            await connection.text(f"logs {number} shows what failed it, and where")
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
    if run.reason.startswith(f"{run.status} "):  # aborted by …
        yield ("status", run.status), f"run {run.run} {run.reason}"
    else:
        reason = f": {run.reason}" if run.reason else ""
        yield ("status", run.status), f"run {run.run} {run.status}{reason}"
