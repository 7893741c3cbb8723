"""Ends: of runs, of a run at some sites, of tasks, of a site's part, of what a run has left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin import units, views
from flplatform.admin.modules.hosts import ABSENT, Hosts, absence, training_at
from flplatform.admin.ports import Control
from flplatform.admin.targets import (
    GRAMMAR,
    SiteArguments,
    TargetArguments,
    current_run,
)
from flplatform.core.control import RunView, SiteView
from flplatform.core.errors import FLError, NotFoundError, PermissionDeniedError
from flplatform.core.lifecycle import ONCE_ENDED, WHILE_ACTIVE, demand_active, demand_over
from flplatform.core.staging import PREPARED
from flplatform.hci import CommandSpec, Connection, argument, did_you_mean

TAKING_PART = ("ok", "…")
"""Answers of targets that have a part in their run."""

STAGES = {"score": "scoring", "submit": "collecting models", "validate": "validating"}


@dataclass(frozen=True)
class AbortArguments:
    """Of `abort`."""

    targets: tuple[str, ...] = argument(
        help=f"{GRAMMAR}; default all",
        complete="target",
        metavar="TARGET",
        rest=True,
        default=("all",),
    )
    run: int | None = argument(
        help="the run's number; default the current one",
        option="--run",
        complete="run",
        metavar="RUN",
        minimum=1,
        default=None,
    )

    def __post_init__(self) -> None:
        first = self.targets[0]
        if first.isdecimal():
            raise ValueError(f"TARGET is {GRAMMAR}; to end run {first}: abort all --run {first}")
        TargetArguments(self.targets)


@dataclass(frozen=True)
class AbortTaskArguments(SiteArguments):
    """Of `abort_task`; the right is asked at each site, not of the run."""

    in_run: int | None = argument(
        help="the run's number; default the current one",
        option="--run",
        complete="run",
        metavar="RUN",
        minimum=1,
        default=None,
    )


@dataclass(frozen=True)
class DeleteArguments:
    """Of `delete_run_number`."""

    run: int = argument(help="the run's number", complete="run", minimum=1)


class LifecycleModule:
    """Ends things, and names before what is lost.

    Args:
        control: sees and steers runs and sites.
        hosts: reaches the sites.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, hosts: Hosts) -> None:
        self._control = control
        self._hosts = hosts

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [
            CommandSpec(
                name="abort",
                summary="ends a run, or ends it at some sites only; what it has published stays",
                arguments=AbortArguments,
                handler=self._abort,
                permission="train",
                mutating=True,
                examples=("abort", "abort all --run 3", "abort client hospital-a"),
                confirm=self._confirm_abort,
                states=WHILE_ACTIVE,
                survives_disconnect=True,
            ),
            CommandSpec(
                name="abort_task",
                summary="gives up what sites are working on; they go on with the next round",
                arguments=AbortTaskArguments,
                handler=self._abort_task,
                permission="operate",
                mutating=True,
                examples=("abort_task hospital-a", "abort_task hospital-a hospital-b --run 3"),
                confirm=self._confirm_abort_task,
                states=f"{WHILE_ACTIVE}, and the site has an open task in it",
            ),
            CommandSpec(
                name="disable_client",
                summary="bars sites from taking part, until enable_client; kept over restarts",
                arguments=SiteArguments,
                handler=self._disable,
                permission="operate",
                mutating=True,
                examples=("disable_client hospital-a",),
                confirm=self._confirm_disable,
            ),
            CommandSpec(
                name="enable_client",
                summary="lets sites take part again, also in runs at work",
                arguments=SiteArguments,
                handler=self._enable,
                permission="operate",
                mutating=True,
                examples=("enable_client hospital-a",),
            ),
            CommandSpec(
                name="delete_run_number",
                summary="deletes a run: models, updates, metrics, and its logs at the sites",
                arguments=DeleteArguments,
                handler=self._delete,
                permission="train",
                mutating=True,
                examples=("delete_run_number 3",),
                confirm=self._confirm_delete,
                states=ONCE_ENDED,
                survives_disconnect=True,
                reauthenticate=True,
            ),
        ]

    # ---- abort ----

    async def _abort(self, connection: Connection, args: AbortArguments) -> None:
        run = self._active(args.run, "abort")
        user = connection.session.user
        if not (named := _named(args)):
            await self._control.abort(run.run, user)
            await connection.row(f"run {run.run}", {"state": "aborted"})
        elif sites := await self._with_part(connection, run, named):
            await self._control.lifecycle.withdraw(run.run, sites, user)
            for site in sites:
                await connection.row(site, {"run": run.run, "state": "withdrawn"})
        run = self._control.run(run.run)
        if named and run.ended:
            await connection.text(f"run {run.run} {run.status}: {run.reason}")
        await connection.data("run", views.of_run(run))

    async def _with_part(
        self, connection: Connection, run: RunView, named: Sequence[str]
    ) -> list[str]:
        """Write a row for each site without a part in the run; return the others."""
        connection.in_order(named)
        sites = {site.name for site in self._control.sites()} | set(run.targets)
        found = []
        for site in dict.fromkeys(named):
            if site not in sites:
                near = did_you_mean(site, run.targets)
                await connection.failed(site, NotFoundError(f"site{near and f' ({near})'}"))
            elif site not in run.targets:
                detail = f"is no target of run {run.run}"
                await connection.row(site, status="error", detail=detail)
            elif run.answers[site] not in TAKING_PART:
                detail = f"has no part in run {run.run}: {run.answers[site]}"
                await connection.row(site, status="error", detail=detail)
            else:
                found.append(site)
        return found

    async def _confirm_abort(self, args: AbortArguments) -> str:
        run = self._active(args.run, "abort")
        left = set(taking_part(run)) - set(_named(args) or run.targets)
        if not left:
            return f"abort run {run.run}: {progress(run)}. Continue?"
        named = ", ".join(site for site in _named(args) if site in taking_part(run))
        if not named:
            return ""
        sites = units.count(len(left), "site")
        after = lost_quorum(run, _named(args), leaving=True) or f"{sites} left"
        return f"end run {run.run} at {named}: {progress(run)}; {after}. Continue?"

    # ---- abort_task ----

    async def _abort_task(self, connection: Connection, args: AbortTaskArguments) -> None:
        run = self._active(args.in_run, "abort_task")
        targets = await self._hosts.admit(connection, args.targets, "operate")
        given_up: dict[str, list[str]] = {}
        for site in targets.sites:
            try:
                tasks = await self._control.lifecycle.abort_task(
                    run.run, site, connection.session.user
                )
            except FLError as error:
                await _failed(connection, site, error)
            else:
                given_up[site] = list(tasks)
                await connection.row(site, {"run": run.run, "given_up": ", ".join(tasks)})
        run = self._control.run(run.run)
        if run.ended:
            await connection.text(f"run {run.run} {run.status}: {run.reason}")
        await connection.data("given_up", given_up)

    async def _confirm_abort_task(self, args: AbortTaskArguments) -> str:
        run = self._active(args.in_run, "abort_task")
        lost = lost_quorum(run, args.sites)
        if not lost:
            return ""
        return f"abort the tasks of {', '.join(args.sites)}: {progress(run)}; {lost}. Continue?"

    # ---- disable_client, enable_client ----

    async def _disable(self, connection: Connection, args: SiteArguments) -> None:
        await self._set_enabled(connection, args, enabled=False)

    async def _enable(self, connection: Connection, args: SiteArguments) -> None:
        await self._set_enabled(connection, args, enabled=True)

    async def _set_enabled(
        self, connection: Connection, args: SiteArguments, *, enabled: bool
    ) -> None:
        targets = await self._hosts.admit(connection, args.targets, "operate")
        state = "enabled" if enabled else "disabled"
        for site in targets.sites:
            try:
                changed = await self._control.lifecycle.set_enabled(
                    site, enabled, connection.session.user
                )
            except FLError as error:
                await _failed(connection, site, error)
            else:
                await connection.row(site, {"state": state if changed else f"{state} already"})

    async def _confirm_disable(self, args: SiteArguments) -> str:
        named = [site for site in self._control.sites() if site.name in args.sites]
        if not (names := ", ".join(site.name for site in named if site.state != "disabled")):
            return ""
        runs = [self._control.run(number) for number in self._control.active_runs()]
        lost = [f"run {run.run}: {what}" for run in runs if (what := lost_quorum(run, args.sites))]
        radius = [training_at(named) or "no site among them is training", *lost]
        return f"disable {names} until enable_client: {'; '.join(radius)}. Continue?"

    # ---- delete_run_number ----

    async def _delete(self, connection: Connection, args: DeleteArguments) -> None:
        run = self._control.run(args.run)
        demand_over(run, "delete_run_number")
        sites = () if run.status == PREPARED else run.targets
        await self._control.lifecycle.delete(run.run, connection.session.user)
        connection.in_order(("server", *sites))
        await connection.row("server", {"run": run.run, "state": "deleted"})
        known = {site.name: site for site in self._control.sites()}
        there = [site for site in sites if _is_there(known.get(site))]
        for site in sites:
            if site not in there:
                detail = f"{absence(known.get(site))}: its logs stay"
                await connection.row(site, status="error", detail=detail)
        cleaned = []
        if there:
            replies = await self._hosts.rows(
                connection, there, lambda body: {"run": run.run, "freed": _size(body.get("bytes"))}
            )
            cleaned = [site for site, reply in replies.items() if reply.status == "ok"]
        await connection.data(
            "deleted", {"run": run.run, "cleaned": cleaned, "left": sorted({*sites} - {*cleaned})}
        )

    async def _confirm_delete(self, args: DeleteArguments) -> str:
        run = self._control.run(args.run)
        demand_over(run, "delete_run_number")
        loses = ["its number is not used again"]
        if run.status != PREPARED:
            models = units.count(len(self._control.metrics(run.run)), "global model")
            logs = units.count(len(run.targets), "site")
            loses = [f"{models}, its updates and metrics, its logs at {logs}", *loses]
        named = f"{run.name}, {run.status}" if run.name else run.status
        return f"delete run {run.run} ({named}): {'; '.join(loses)}. Continue?"

    def _active(self, given: int | None, command: str) -> RunView:
        run = self._control.run(current_run(self._control, given))
        demand_active(run, command)
        return run


def taking_part(run: RunView) -> list[str]:
    """Return the targets that have neither declined nor been withdrawn."""
    return [site for site in run.targets if run.answers.get(site) in TAKING_PART]


def progress(run: RunView) -> str:
    """Say what a run would lose, and who is at work: every open round or gathering counts."""
    if run.status == "deploying":
        return f"deploying, {len(run.accepted)} of {units.count(len(run.targets), 'site')} accepted"
    if run.phase == "round":
        kept, doing = units.count(run.results, "accepted update"), "training"
    elif run.phase:
        kept = units.count(run.results, "accepted result")
        doing = STAGES.get(run.phase, "working")
    else:
        return f"round {run.round} of {run.rounds} done, no task is open"
    return f"round {run.round}, {kept} kept, {units.count(len(run.waiting), 'site')} {doing}"


def lost_quorum(run: RunView, sites: Iterable[str], *, leaving: bool = False) -> str:
    """Say what becomes of a run whose quorum is lost without the open tasks of these sites.

    Args:
        run: the run.
        sites: whose tasks are given up.
        leaving: whether the sites leave the run too.
    """
    if run.phase == "round":
        possible = set(run.accepted) | (set(run.waiting) - set(sites))
        if len(possible) < run.min_clients:
            return f"quorum {run.min_clients} is lost then and the run may fail"
    left = set(taking_part(run)) - set(sites)
    if leaving and len(left) < run.min_clients:
        return f"quorum {run.min_clients} cannot be reached then and the run will fail"
    return ""


def _named(args: AbortArguments) -> tuple[str, ...]:
    """Return the sites at which alone a run is to end; none if it is to end as a whole."""
    return args.targets[1:] if args.targets[0] == "client" else ()


def _is_there(site: SiteView | None) -> bool:
    return site is not None and site.state not in ABSENT and site.certificate_days is not None


def _size(value: object) -> str | None:
    return units.size(value) if isinstance(value, int | float) else None


async def _failed(connection: Connection, site: str, error: FLError) -> None:
    if isinstance(error, PermissionDeniedError):
        await connection.failed(site, error)
    else:
        await connection.row(site, status="error", detail=str(error.message))
