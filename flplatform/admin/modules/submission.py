"""`submit_job`: the console's action, and the two verbs with which it reaches the server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin.modules.hosts import BARRED, reachable, write_row
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.core.config import Name, Strict, parse_json
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.hci import CommandSpec, Connection, argument

PREFLIGHT, SUBMIT = "preflight", "submit"
HIDDEN = frozenset(
    {"revocation", "deny", "prove", "change_password"}
    | {PREFLIGHT, SUBMIT, "stage", "start_plan", "begin", "dashboard_feed", "announce_file"}
    | {"validate_plan", "validate_begin"}
)
"""Verbs that the console sends and no user types."""

PREFLIGHT_TIMEOUT_S = 5.0


class Question(Strict):
    """What a preflight asks of each site: would you take part in this job?

    Attributes:
        job: the job's name.
        has_code: whether it brings code of its own.
        data: the datasets it wants.
        environment: the environment it wants.
        sites: who is asked; all registered ones if empty.
        gpus: site -> processes that are to work on it together there.
        processes: the same, at each site that `gpus` does not name.
    """

    job: Name
    has_code: bool
    data: tuple[Name, ...]
    environment: Name
    sites: tuple[str, ...]
    gpus: dict[str, int] = {}
    processes: int = 1


@dataclass(frozen=True)
class SubmitJob:
    """Of `submit_job`."""

    job: str = argument(help="folder with job.yml and code/", complete="path:job.yml")
    sites: tuple[str, ...] = argument(
        help="target sites; default all that are registered",
        option="--sites",
        complete="site",
        metavar="SITE",
        default=(),
    )
    min: int | None = argument(
        help="updates that close a round; default the job's min_clients",
        option="--min",
        metavar="N",
        minimum=1,
        default=None,
    )
    gpus: tuple[str, ...] = argument(
        help="processes at each site, one per GPU: N, or of named sites; default 1",
        option="--gpus",
        metavar="N|SITE=N",
        default=(),
    )
    wait: bool = argument(help="follow the run until it has ended", option="--wait", default=False)
    submission: str = argument(
        help="id of an earlier try: the same submission is never run twice",
        option="--submission",
        metavar="ID",
        default="",
    )


@dataclass(frozen=True)
class PreflightArguments:
    """Of `preflight`."""

    question: str = argument(help="a Question as JSON")


@dataclass(frozen=True)
class SubmitArguments:
    """Of `submit`."""

    min: int | None = argument(
        help="updates that close a round", option="--min", metavar="N", minimum=1, default=None
    )


class SubmissionModule:
    """Submitting jobs.

    Args:
        control: asks the sites and opens runs.
        timeout_s: how long a site may take to answer a preflight.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(self, control: Control, timeout_s: float = PREFLIGHT_TIMEOUT_S) -> None:
        self._control = control
        self._timeout_s = timeout_s

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands; all of them need the right to submit."""
        return [
            CommandSpec(
                name="submit_job",
                summary="checks, signs, uploads and starts a job, with a plan first",
                arguments=SubmitJob,
                handler=_console_only,
                permission="train",
                mutating=True,
                examples=(
                    "submit_job jobs/heart",
                    "submit_job jobs/heart --sites hospital-a,hospital-b --min 2 --wait",
                    "submit_job jobs/heart --gpus hospital-a=2,hospital-b=4",
                ),
                local="submit_job",
            ),
            CommandSpec(
                name=PREFLIGHT,
                summary="asks the sites whether they would take part",
                arguments=PreflightArguments,
                handler=self._preflight,
                permission="train",
                mutating=False,
                examples=("preflight {}",),
            ),
            CommandSpec(
                name=SUBMIT,
                summary="opens a run for the signed start that comes with it",
                arguments=SubmitArguments,
                handler=self._submit,
                permission="train",
                mutating=True,
                examples=("submit", "submit --min 2"),
                survives_disconnect=True,
            ),
        ]

    async def _preflight(self, connection: Connection, args: PreflightArguments) -> None:
        question = parse_json(Question, args.question, PREFLIGHT)
        known = {site.name: site for site in self._control.sites()}
        if not known:
            raise FailedPreconditionError("no site is registered", hint="start the sites first")
        usable = [site.name for site in known.values() if site.state not in BARRED]
        asked = await reachable(connection, self._control, question.sites or usable)
        replies = await self._control.ask(
            asked, PREFLIGHT, timeout_s=self._timeout_s, signed=ordered().signed
        )
        for site, reply in replies.items():
            cells = {"isolation": str(reply.body.get("isolation", ""))[:20]}
            await write_row(connection, site, reply, cells if reply.status == "ok" else None)

    async def _submit(self, connection: Connection, args: SubmitArguments) -> None:
        order = ordered().attachment
        if not order:
            raise InvalidArgumentError("came without a start order", hint="use submit_job")
        run = await self._control.submit(order, connection.session.user, args.min)
        await connection.remember("run", run)
        await connection.data("run", run)


async def _console_only(_: Connection, __: SubmitJob) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")


def encode(question: Question) -> str:
    """Return the word that carries a question."""
    return json.dumps(question.model_dump(mode="json", exclude_defaults=True))
