"""`check_status`: who does what, since when."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flplatform.admin import views
from flplatform.admin.modules.hosts import ABSENT, Cells, Hosts, absence, write_row
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.targets import TargetArguments, only_active
from flplatform.core.control import RunView, SiteReply, SiteView
from flplatform.core.errors import NotFoundError
from flplatform.core.staging import PREPARED
from flplatform.hci import CommandSpec, Connection

COLUMNS = (
    "state",
    "run",
    "round",
    "round_of",
    "phase",
    "since_s",
    "last_seen_s",
    "certificate_days",
)


UNREACHABLE = ABSENT | {"expected"}

CONTESTED = "registers again and again: do two processes use its kit?"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a site does in a run; `since_s` in seconds."""

    run: int
    round: int
    phase: str
    since_s: float


class StatusModule:
    """The state of server and sites.

    Args:
        control: sees and reaches them.
        hosts: resolves targets.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, hosts: Hosts) -> None:
        self._control = control
        self._hosts = hosts

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command."""
        return [
            CommandSpec(
                name="check_status",
                summary="shows what server and sites are doing",
                arguments=TargetArguments,
                handler=self._check_status,
                permission="view",
                mutating=False,
                examples=(
                    "check_status all",
                    "check_status server",
                    "check_status client hospital-a hospital-b",
                ),
            )
        ]

    async def _check_status(self, connection: Connection, args: TargetArguments) -> None:
        runs = self._runs_in_view()
        sites = {site.name: site for site in self._control.sites()}
        expected = {target for run in runs for target in run.targets}
        targets = await self._hosts.admit(connection, args.targets, "view", expected)
        if targets.server:
            trouble = self._control.server().trouble
            status = "error" if trouble else "ok"
            await connection.row("server", self._server_cells(runs), status=status, detail=trouble)
        there = [name for name in targets.sites if name in sites and _reachable(sites[name])]
        replies = await self._hosts.ask(there)
        for name in targets.sites:
            site = sites.get(name)
            cells = _site_cells(name, site, replies.get(name), runs)
            if site is not None and site.contested:
                await connection.row(name, cells, status="error", detail=CONTESTED)
            elif name in replies:
                await write_row(connection, name, replies[name], cells)
            elif site is None or site.state in UNREACHABLE:
                await connection.row(name, cells, status="error", detail=absence(site))
            else:
                await connection.row(name, cells)
        await connection.data("server", asdict(self._control.server()))
        await connection.data("runs", [views.of_run(run) for run in runs])
        await connection.data(
            "sites", [asdict(sites[name]) for name in targets.sites if name in sites]
        )

    def _runs_in_view(self) -> list[RunView]:
        """The session's run if it has one, then the active runs."""
        numbers = [run for run in (ordered().order.run,) if run]
        numbers += [run for run in self._control.active_runs() if run not in numbers]
        views = []
        for number in numbers:
            try:
                views.append(self._control.run(number))
            except NotFoundError:
                continue  # the session remembers a run of another server
        return views

    def _server_cells(self, runs: Sequence[RunView]) -> Cells:
        server = self._control.server()
        cells: dict[str, None | int | float | str] = dict.fromkeys(COLUMNS)
        cells |= {"state": server.state, "certificate_days": server.certificate_days}
        chosen = ordered().order.run or only_active(self._control)
        run = next((run for run in runs if run.run == chosen), None)
        if run is None:
            prepared = [run.run for run in self._control.runs() if run.status == PREPARED]
            waiting = f"run {prepared[-1]} {PREPARED}" if prepared else "no run active"
            phase = f"{len(runs)} runs active" if runs else waiting
        else:
            cells |= {"run": run.run, "round": run.round, "round_of": run.rounds}
            phase = progress_of(run)
        return cells | {"phase": phase}


def progress_of(run: RunView) -> str:
    """Say in a few words how far a run is."""
    if run.ended or run.status == PREPARED:
        return run.status
    what = {"deploying": "answers", "training": "updates"}.get(run.status, "results")
    return f"{run.status}: {len(run.accepted)} of {len(run.accepted) + len(run.waiting)} {what}"


def _reachable(site: SiteView) -> bool:
    return site.state not in UNREACHABLE and site.certificate_days is not None


def _site_cells(
    name: str, site: SiteView | None, reply: SiteReply | None, runs: Sequence[RunView]
) -> Cells:
    cells: dict[str, None | int | float | str] = dict.fromkeys(COLUMNS)
    activities = _activities(site, reply)
    chosen = {run.run: run for run in runs}
    at_work = next(
        (each for run in runs for each in activities if each.run == run.run),
        activities[0] if activities else None,
    )
    if site is None:
        cells["state"] = "away"
    elif at_work is None or site.state != "live":
        cells["state"] = "idle" if site.state == "live" else site.state
    else:
        run = chosen.get(at_work.run)
        cells |= {
            "state": run.status if run else "busy",
            "run": at_work.run,
            "round": at_work.round,
            "phase": at_work.phase,
            "since_s": at_work.since_s,
        }
    refusal = next((_refusal(run, name) for run in runs if _refusal(run, name)), "")
    if cells["phase"] is None and refusal:
        cells["phase"] = refusal
    if site is not None:
        cells |= {
            "last_seen_s": site.last_seen_s,
            "certificate_days": site.certificate_days,
        }
    return cells


def _refusal(run: RunView, site: str) -> str:
    answer = run.answers.get(site, "")
    return f"declined run {run.run}" if answer.startswith("declined") else ""


def _activities(site: SiteView | None, reply: SiteReply | None) -> list[Activity]:
    """What the site has just said, or else what its last heartbeat said."""
    if reply is not None and reply.status == "ok":
        reported = reply.body.get("runs", [])
        if not isinstance(reported, list):
            return []
        return [activity for each in reported if (activity := _parse(each))]
    return [Activity(*report) for report in site.runs] if site else []


def _parse(report: object) -> Activity | None:
    """Read one entry of a site's answer; None if it is not one."""
    if not isinstance(report, Mapping):
        return None
    try:
        processes = int(report.get("processes", 1))
        return Activity(
            int(report["run"]),
            int(report["round"]),
            str(report["phase"])[:60] + (f", {processes:.6g} processes" if processes > 1 else ""),
            float(report["since_s"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
