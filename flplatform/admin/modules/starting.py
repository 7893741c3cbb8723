"""`start` and `start_mgpu`: the console's actions, and the verbs by which they reach the server."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flplatform.admin.modules.hosts import BARRED
from flplatform.admin.modules.steps import console_only, run_option
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import TargetArguments, current_run
from flplatform.admin.transfers import Transfers
from flplatform.core.diagnosis import rejoin
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from flplatform.core.staging import PREPARED
from flplatform.hci import CommandSpec, Connection, argument, did_you_mean

START_PLAN, BEGIN = "start_plan", "begin"
"""Verbs that the console sends and no user types; `submission.HIDDEN` lists them."""

WHEN_STARTING = "while the run is prepared and deployed; at more sites also while it is active"


def _min() -> Any:
    return argument(
        help="updates that close a round; default the job's min_clients",
        option="--min",
        metavar="N",
        minimum=1,
        default=None,
    )


@dataclass(frozen=True)
class StartArguments(TargetArguments):
    """Of `start`."""

    run: int | None = run_option()
    min: int | None = _min()


@dataclass(frozen=True)
class StartGpus:
    """Of `start_mgpu`."""

    gpus: int = argument(help="processes at each site, one per GPU", metavar="GPUS", minimum=1)
    sites: tuple[str, ...] = argument(
        help="the sites; default all where the run is deployed",
        complete="site",
        metavar="SITE",
        rest=True,
        default=(),
    )
    run: int | None = run_option()
    min: int | None = _min()


@dataclass(frozen=True)
class PlanArguments(TargetArguments):
    """Of `start_plan`."""

    run: int | None = run_option()


@dataclass(frozen=True)
class BeginArguments:
    """Of `begin`."""

    run: int | None = run_option()
    min: int | None = _min()


class StartingModule:
    """Starting prepared runs, and having sites join runs at work.

    Args:
        control: starts.
        rights: decides who may submit.
        transfers: lets the console fetch the package that it is to sign a start of.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, rights: Rights, transfers: Transfers) -> None:
        self._control = control
        self._rights = rights
        self._transfers = transfers

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands, and the verbs that the console's own actions use."""
        needs = ("upload_folder", "set_run_number", "deploy")
        return [
            CommandSpec(
                name="start",
                summary="signs and starts a deployed run, or adds sites to one, with a plan first",
                arguments=StartArguments,
                handler=console_only,
                permission="train",
                mutating=True,
                examples=("start all", "start client hospital-a --run 7 --min 1"),
                states=WHEN_STARTING,
                local="start",
                needs=needs,
            ),
            CommandSpec(
                name="start_mgpu",
                summary="as start client, with so many processes at each site, one per GPU",
                arguments=StartGpus,
                handler=console_only,
                permission="train",
                mutating=True,
                examples=("start_mgpu 2", "start_mgpu 4 hospital-a hospital-b --run 7"),
                states=WHEN_STARTING,
                local="start",
                needs=needs,
            ),
            CommandSpec(
                name=START_PLAN,
                summary="says what a start would be about",
                arguments=PlanArguments,
                handler=self._start_plan,
                permission="train",
                mutating=False,
                examples=("start_plan all --run 7",),
            ),
            CommandSpec(
                name=BEGIN,
                summary="starts a run by the signed start that comes with it",
                arguments=BeginArguments,
                handler=self._begin,
                permission="train",
                mutating=True,
                examples=("begin --run 7 --min 2",),
                survives_disconnect=True,
            ),
        ]

    async def _start_plan(self, connection: Connection, args: PlanArguments) -> None:
        number = current_run(self._control, args.run)
        self._rights.demand_submit(ordered().signer)
        plan = self._control.staging.plan(number)
        prepared = plan.status == PREPARED
        only_server = args.targets == ("server",)
        if only_server or args.targets == ("all",):
            detail = "waits for start client" if only_server else "is starting"
            detail = detail if prepared else f"run {number} is {plan.status}"
            await connection.row("server", detail=detail)
        known = dict.fromkeys(plan.sites, "")
        known |= {site.name: site.state for site in self._control.sites()}
        named = dict.fromkeys(args.targets[1:])
        starting = []
        for site in () if only_server else (named or plan.sites):
            if site not in known:
                near = did_you_mean(site, known)
                await connection.failed(site, NotFoundError(f"site{near and f' ({near})'}"))
            elif known[site] in BARRED:
                help_ = f": enable_client {site}" if known[site] == "disabled" else ""
                detail = f"{known[site]} on the server{help_}"
                await connection.row(site, status="refused", detail=detail)
            elif site in plan.taking_part:
                abort, _ = rejoin(site, number)
                anew = f"; if it has lost the run: {abort} first" if site in named else ""
                await connection.row(site, detail=f"takes part already{anew}")
            elif prepared and site not in plan.sites:
                detail = f"not deployed; deploy {plan.job_name} client {site}"
                await connection.row(site, status="error", detail=detail)
            elif not prepared and not named:
                await connection.row(site, detail=f"takes no part; start client {site} asks again")
            else:
                starting.append(site)
        if starting:
            self._transfers.grant(connection.session, plan.package.digest)
        elif not only_server and not (named or plan.sites):
            raise FailedPreconditionError(
                f"run {number} is deployed at no site",
                rule="run deployed",
                hint=f"deploy {plan.job_name} client",
            )
        await connection.data("plan", {**asdict(plan), "starting": starting})

    async def _begin(self, connection: Connection, args: BeginArguments) -> None:
        number = current_run(self._control, args.run)
        command = ordered()
        self._rights.demand_submit(command.signer)
        if not command.attachment:
            raise InvalidArgumentError("came without a start order", hint="use start")
        await self._control.staging.begin(
            number, command.attachment, connection.session.user, args.min
        )
        await connection.remember("run", number)
        await connection.data("run", number)
