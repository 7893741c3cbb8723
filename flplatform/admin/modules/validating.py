"""`validate`: the console's action, and the verbs by which it reaches the server."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flplatform.admin.modules.hosts import reachable, write_row
from flplatform.admin.modules.steps import console_only, run_option
from flplatform.admin.modules.submission import PREFLIGHT_TIMEOUT_S
from flplatform.admin.modules.validation import models_as_json
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.targets import current_run
from flplatform.admin.transfers import Transfers
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.validation import Wanted
from flplatform.hci import CommandSpec, Connection, argument

VALIDATE_PLAN, VALIDATE_BEGIN = "validate_plan", "validate_begin"
"""Verbs that the console sends and no user types; `submission.HIDDEN` lists them."""

ALL = "all"
STATES = "once the run has begun its first round, also after its end, until it is deleted"


def _names(option: str, help: str) -> Any:  # noqa: A002 - as `argument` has it
    return argument(help=help, option=option, complete="site", metavar="SITE", default=())


def _owners() -> Any:
    return _names("--owners", "only these models; default the global one and every site's")


def _sites() -> Any:
    return _names("--sites", "only at these sites; default all of the run")


@dataclass(frozen=True)
class Validate:
    """Of `validate`."""

    owner: str = argument(
        help="all, or whose model: a site, global, best, last, or rN for that of round N",
        complete="site",
        metavar="all|MODEL_OWNER",
    )
    site: str = argument(
        help="on whose data; not after all", complete="site", metavar="DATA_SITE", default=""
    )
    run: int | None = run_option()
    owners: tuple[str, ...] = _owners()
    sites: tuple[str, ...] = _sites()
    no_wait: bool = argument(
        help="return as soon as the validation has its run number",
        option="--no-wait",
        default=False,
    )
    csv: bool = argument(
        help="write the matrix, and nothing else, as comma-separated values",
        option="--csv",
        default=False,
    )
    submission: str = argument(
        help="id of an earlier try: the same validation is never run twice",
        option="--submission",
        metavar="ID",
        default="",
    )

    def __post_init__(self) -> None:
        wanted(self.owner, self.site, self.owners, self.sites)


def wanted(owner: str, site: str, owners: tuple[str, ...], sites: tuple[str, ...]) -> Wanted:
    """Return what the words of `validate` mean.

    Raises:
        ValueError: they do not fit together.
    """
    if owner == ALL:
        if site:
            raise ValueError(f"nothing can follow all, but {site[:80]!r} does; see --sites")
        return Wanted(owners, sites)
    if owners or sites:
        raise ValueError("--owners and --sites go with all only")
    if not site:
        raise ValueError(f"DATA_SITE is missing; or validate all --owners {owner[:80]}")
    return Wanted((owner,), (site,))


@dataclass(frozen=True)
class Wanting:
    """Of `validate_plan` and `validate_begin`."""

    run: int | None = run_option()
    owners: tuple[str, ...] = _owners()
    sites: tuple[str, ...] = _sites()

    @property
    def wanted(self) -> Wanted:
        """The same without the run."""
        return Wanted(self.owners, self.sites)


class ValidatingModule:
    """Validation on demand.

    Args:
        control: chooses the models, asks the sites and opens runs.
        transfers: lets the console fetch the package that it is to sign a start of.
        timeout_s: how long a site may take to say whether it would take part.
    """

    name = "validation"
    summary = "models measured at other sites"

    def __init__(
        self, control: Control, transfers: Transfers, timeout_s: float = PREFLIGHT_TIMEOUT_S
    ) -> None:
        self._control = control
        self._transfers = transfers
        self._timeout_s = timeout_s

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The command, and the verbs that the console's own action uses."""
        return [
            CommandSpec(
                name="validate",
                summary="measures models of a run at sites, as a run of its own, with a plan first",
                arguments=Validate,
                handler=console_only,
                permission="validate",
                mutating=True,
                examples=(
                    "validate all",
                    "validate hospital-a hospital-b --run 3",
                    "validate all --owners global,r5 --sites hospital-a --no-wait",
                ),
                states=STATES,
                local="validate",
            ),
            CommandSpec(
                name=VALIDATE_PLAN,
                summary="says what a validation would be about, and who would take part",
                arguments=Wanting,
                handler=self._plan,
                permission="validate",
                mutating=False,
                examples=("validate_plan --run 3",),
            ),
            CommandSpec(
                name=VALIDATE_BEGIN,
                summary="opens a validation by the signed start that comes with it",
                arguments=Wanting,
                handler=self._begin,
                permission="validate",
                mutating=True,
                examples=("validate_begin --run 3 --owners global",),
                survives_disconnect=True,
            ),
        ]

    async def _plan(self, connection: Connection, args: Wanting) -> None:
        number = current_run(self._control, args.run, ended=True)
        if args.run is None:  # the latest run may be a validation itself: then its source is meant
            number = self._control.run(number).source_run or number
        plan = await self._control.validations.plan(number, args.wanted)
        connection.in_order(plan.sites)
        asked = await reachable(connection, self._control, plan.sites)
        question = {
            "has_code": plan.has_code,
            "data": plan.data,
            "environment": plan.environment,
            "author": plan.author,
            "author_organisation": plan.author_organisation,
            "author_role": plan.author_role,
        }
        command = ordered()
        replies = await self._control.ask(
            asked,
            command.order.argv[0],
            timeout_s=self._timeout_s,
            signed=command.signed,
            body=question,
        )
        for site, reply in replies.items():
            cells = {"isolation": str(reply.body.get("isolation", ""))[:20]}
            await write_row(connection, site, reply, cells if reply.status == "ok" else None)
        self._transfers.grant(connection.session, plan.package.digest)
        await connection.data("plan", {**asdict(plan), "models": models_as_json(plan.models)})

    async def _begin(self, connection: Connection, args: Wanting) -> None:
        order = ordered().attachment
        if not order:
            raise InvalidArgumentError("came without a start order", hint="use validate")
        number = current_run(self._control, args.run, ended=True)
        run = await self._control.validations.open(
            number, order, connection.session.user, args.wanted
        )
        await connection.data("run", run)
