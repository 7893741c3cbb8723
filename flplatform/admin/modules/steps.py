"""Clara's steps towards a run: stage a job, take a number, deploy; `starting` has the last."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin.modules.hosts import reachable, write_row
from flplatform.admin.modules.submission import PREFLIGHT_TIMEOUT_S, Question
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.admin.targets import GRAMMAR, TargetArguments, current_run, resolve
from flplatform.admin.units import moment, size
from flplatform.core.config import NAME_PATTERN
from flplatform.core.errors import (
    FailedPreconditionError,
    NotFoundError,
)
from flplatform.core.staging import StagedJob, demand_prepared
from flplatform.hci import CommandSpec, Connection, NoArguments, argument, did_you_mean

STAGE = "stage"
"""Verb that the console sends and no user types; `submission.HIDDEN` lists it."""

WHILE_PREPARED = "while the run is prepared: it has a number and has not begun"


def _targets() -> Any:
    return argument(help=GRAMMAR, complete="target", metavar="TARGET", rest=True)


def run_option() -> Any:
    """Return the field of an arguments dataclass that names the run, `--run N`."""
    return argument(
        help="the run's number; default the current one",
        option="--run",
        complete="run",
        metavar="RUN",
        minimum=1,
        default=None,
    )


@dataclass(frozen=True)
class RunNumber:
    """Of `set_run_number`."""

    number: int = argument(help="the run's number", complete="run", metavar="RUN", minimum=1)


@dataclass(frozen=True)
class UploadFolder:
    """Of `upload_folder`."""

    job: str = argument(help="folder with job.yml and code/", complete="path:job.yml")
    name: str = argument(
        help="what to call it on the server; default the job's name",
        option="--as",
        metavar="NAME",
        default="",
    )


@dataclass(frozen=True)
class StageArguments:
    """Of `stage`."""

    name: str = argument(help="what to call it")
    digest: str = argument(help="of the uploaded package")

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise ValueError(f"NAME {self.name[:80]!r} is not 1 to 63 of a-z 0-9 . _ -")


@dataclass(frozen=True)
class StagedName:
    """Of `delete_job`."""

    job: str = argument(help="a staged job", complete="job")


@dataclass(frozen=True)
class DeployArguments:
    """Of `deploy`."""

    job: str = argument(help="a staged job", complete="job")
    targets: tuple[str, ...] = _targets()
    run: int | None = run_option()

    def __post_init__(self) -> None:
        TargetArguments(self.targets)


class StepsModule:
    """Steps towards a run.

    Args:
        control: stages, reserves and deploys.
        rights: decides about what belongs to somebody.
        timeout_s: how long a site may take to say whether it accepts a job.
    """

    name = "training"
    summary = "runs and the sites that work on them"

    def __init__(
        self,
        control: Control,
        rights: Rights,
        timeout_s: float = PREFLIGHT_TIMEOUT_S,
    ) -> None:
        self._control = control
        self._rights = rights
        self._timeout_s = timeout_s

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands, and the verb that `upload_folder` uses."""
        return [*self._job_commands(), *self._run_commands()]

    def _job_commands(self) -> list[CommandSpec[Any]]:
        return [
            CommandSpec(
                name="upload_folder",
                summary="checks, signs and uploads a job, to be deployed later",
                arguments=UploadFolder,
                handler=console_only,
                permission="train",
                mutating=True,
                examples=("upload_folder jobs/heart", "upload_folder jobs/heart --as heart-2"),
                local="upload_folder",
            ),
            CommandSpec(
                name=STAGE,
                summary="keeps an uploaded job under a name",
                arguments=StageArguments,
                handler=self._stage,
                permission="train",
                mutating=True,
                examples=("stage heart blake3:00",),
                survives_disconnect=True,
            ),
            CommandSpec(
                name="list_jobs",
                summary="lists the jobs that are staged on the server",
                arguments=NoArguments,
                handler=self._list_jobs,
                permission="view",
                mutating=False,
                examples=("list_jobs",),
            ),
            CommandSpec(
                name="delete_job",
                summary="gives up a staged job; runs that it was deployed for keep it",
                arguments=StagedName,
                handler=self._delete_job,
                permission="train",
                mutating=True,
                examples=("delete_job heart",),
                states="while the job is staged",
                survives_disconnect=True,
            ),
        ]

    def _run_commands(self) -> list[CommandSpec[Any]]:
        return [
            CommandSpec(
                name="set_run_number",
                summary="makes a run the session's current one; a new number is reserved",
                arguments=RunNumber,
                handler=self._set_run_number,
                permission="view",
                mutating=True,
                examples=("set_run_number 3",),
                states="always; a number above all others becomes a prepared run",
                survives_disconnect=True,
            ),
            CommandSpec(
                name="deploy",
                summary="asks targets whether they accept a staged job, and notes those that do",
                arguments=DeployArguments,
                handler=self._deploy,
                permission="train",
                mutating=True,
                examples=("deploy heart all", "deploy heart client hospital-a --run 7"),
                states=WHILE_PREPARED,
                needs=("upload_folder", "set_run_number"),
                survives_disconnect=True,
            ),
        ]

    # ---- jobs ----

    async def _stage(self, connection: Connection, args: StageArguments) -> None:
        session = connection.session
        if (known := self._control.staging.jobs().get(args.name)) is not None:
            self._demand_owner(known, STAGE)
        job = await self._control.staging.stage(
            args.name, args.digest, session.user, session.organisation
        )
        await connection.data("job", _as_json(job))

    async def _list_jobs(self, connection: Connection, _: NoArguments) -> None:
        jobs = self._control.staging.jobs().values()
        rows = [
            (job.name, job.by, size(_bytes(job)), job.parameters, moment(job.staged))
            for job in jobs
        ]
        if rows:
            await connection.table("jobs", ("name", "by", "size", "parameters", "staged"), rows)
        else:
            await connection.text("no jobs are staged; upload_folder stages one")
        await connection.data("jobs", [_as_json(job) for job in jobs])

    async def _delete_job(self, connection: Connection, args: StagedName) -> None:
        self._demand_owner(self._job(args.job), "delete_job")
        await self._control.staging.unstage(args.job, connection.session.user)
        await connection.text(f"{args.job} is not staged any more")

    def _job(self, name: str) -> StagedJob:
        jobs = self._control.staging.jobs()
        if name not in jobs:
            hint = did_you_mean(name, jobs) or "upload_folder JOB stages one; list_jobs shows them"
            raise NotFoundError(f"no job {name[:80]!r} is staged", hint=hint)
        return jobs[name]

    def _demand_owner(self, job: StagedJob, command: str) -> None:
        self._rights.demand_on(ordered().signer, "train", command, job.by, job.organisation)

    # ---- runs ----

    async def _set_run_number(self, connection: Connection, args: RunNumber) -> None:
        session, signer = connection.session, ordered().signer
        try:
            run = self._control.run(args.number)
        except NotFoundError:
            self._rights.demand_submit(signer)
            await self._control.staging.reserve(args.number, session.user, session.organisation)
            line = f"created run {args.number}"
        else:
            self._rights.demand_on(
                signer, "view", "set_run_number", run.submitter, run.submitter_organisation
            )
            line = f"run {run.run}: {', '.join(filter(None, (run.name, run.status)))}"
        await connection.text(line)
        await connection.remember("run", args.number)
        await connection.data("run", args.number)

    async def _deploy(self, connection: Connection, args: DeployArguments) -> None:
        if args.run is None and ordered().order.run is None:
            raise FailedPreconditionError("no run is chosen", hint="set_run_number N first")
        number = current_run(self._control, args.run)
        self._rights.demand_submit(ordered().signer)
        demand_prepared(self._control.run(number))
        job = self._job(args.job)
        targets = resolve(args.targets, [site.name for site in self._control.sites()])
        connection.in_order(("server", *(args.targets[1:] or targets.sites)))
        asked = await reachable(connection, self._control, (*targets.sites, *targets.unknown))
        question = Question(
            job=job.name,
            has_code=job.has_code,
            data=job.job.data,
            environment=job.job.environment,
            sites=(),
        )
        command = ordered()
        replies = await self._control.ask(
            asked,
            command.order.argv[0],
            timeout_s=self._timeout_s,
            signed=command.signed,
            body=question.model_dump(mode="json"),
        )
        accepted = [site for site, reply in replies.items() if reply.status == "ok"]
        if accepted or targets.server:
            await self._note_deployed(connection, number, job, accepted)
        if targets.server:
            await connection.row("server", {"answer": "has it", "isolation": None})
        for site, reply in replies.items():
            isolation = str(reply.body.get("isolation", ""))[:20]
            cells = {"answer": "accepts", "isolation": isolation}
            await write_row(connection, site, reply, cells if reply.status == "ok" else None)

    async def _note_deployed(
        self, connection: Connection, number: int, job: StagedJob, accepted: Sequence[str]
    ) -> None:
        before = self._control.run(number).targets
        user = connection.session.user
        plan = await self._control.staging.deploy(number, job.name, accepted, user)
        if lost := sorted(set(before) - set(plan.sites)):
            await connection.text(
                f"another package was deployed before: deploy {job.name} client {' '.join(lost)}"
            )
        await connection.data("deployed", {"run": number, "sites": list(plan.sites)})


def _bytes(job: StagedJob) -> int:
    return job.package.size + job.model.size


def _as_json(job: StagedJob) -> dict[str, Any]:
    return {
        "name": job.name,
        "job": job.job.name,
        "by": job.by,
        "bytes": _bytes(job),
        "parameters": job.parameters,
        "staged": job.staged,
        "digest": job.package.digest,
    }


async def console_only(_: Connection, __: object) -> None:
    """Refuse a command that the console must carry out itself.

    Raises:
        FailedPreconditionError: always.
    """
    raise FailedPreconditionError("this command belongs to the console, not to the server")
