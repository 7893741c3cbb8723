"""`submit_job`: check, build, ask, sign, upload, start."""

import re
import secrets
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from grpc import aio

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.starting_point import StartingPoint, from_file, from_function
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.console.wait import follow
from flplatform.admin.modules.submission import PREFLIGHT, SUBMIT, Question, encode
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER, JOB_FILE, JobSpec, check_targets, parse_job
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import write_atomic
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.shell import Shell
from flplatform.rpc.streams import send_blob
from flplatform.security.package import pack, read_job_folder
from flplatform.security.signing import StartOrder

ORDER_S = 86_400.0
"""How long sites may accept a start after it was signed."""

_SUBMISSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A job on its way.

    Attributes:
        submission: its id; the server never runs one twice.
        folder: the job's.
        files: what is packed.
        job: the parsed `job.yml`.
        quorum: updates that close a round.
        given_quorum: the quorum if the user set it.
    """

    submission: str
    folder: Path
    files: Mapping[str, bytes]
    job: JobSpec
    quorum: int
    given_quorum: int | None


async def submit_job(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Submit a job and return the exit code.

    Raises:
        FLError: what is wrong with the job, or why it is refused.
        OSError: a file cannot be read.
    """
    values = shell.parse(argv)
    draft = _draft(values, transport.credentials.kit.folder / "transfer")
    with tempfile.TemporaryDirectory(prefix="fl-submit-") as folder:
        try:
            start = await _starting_point(transport, shell, draft, Path(folder))
            answers = await _preflight(transport, shell, draft, values["sites"])
            sites = _check_answers(draft, answers)
            shell.show({"type": "text", "text": "\n".join(_plan(draft, start, answers))})
            willing = sum(answer["status"] == "ok" for answer in answers)
            question = f"{willing} of {len(sites)} sites would take part, quorum {draft.quorum}"
            if not await shell.confirm(f"{question}. Submit?"):
                shell.show({"type": "text", "text": "nothing was submitted"})
                return ExitCode.INTERRUPTED
            run = await _send(transport, shell, draft, start, sites, Path(folder))
        except Refused as refused:
            return refused.exit_code
    return await follow(transport, ["wait", str(run)], shell) if values["wait"] else ExitCode.OK


def _draft(values: Mapping[str, Any], transfer: Path) -> Draft:
    """Read the job: a folder here, or of that name in the kit's `transfer` folder."""
    folder = Path(values["job"]).expanduser()
    if not folder.is_dir() and (transfer / folder).is_dir():
        folder = transfer / folder
    files = read_job_folder(folder)
    job = parse_job(files[JOB_FILE].decode("utf-8", "replace"), str(folder / JOB_FILE))
    _check_executor(job, files)
    submission = values["submission"] or secrets.token_hex(16)
    if not _SUBMISSION.fullmatch(submission):
        raise InvalidArgumentError("is not 32 hex digits", field="--submission")
    given = values["min"]
    return Draft(submission, folder, files, job, given or job.min_clients, given)


def _check_executor(job: JobSpec, files: Collection[str]) -> None:
    """Refuse a job whose code is not there, before anybody is asked to run it."""
    executor = job.executor
    path = executor.script or executor.module.replace(".", "/") + ".py"
    package = f"{CODE_FOLDER}/{executor.module.replace('.', '/')}/__init__.py"
    if f"{CODE_FOLDER}/{path}" not in files and package not in files:
        raise InvalidArgumentError(
            f"there is no {CODE_FOLDER}/{path} in the job",
            field="executor.script" if executor.script else "executor.module",
        )


async def _starting_point(
    transport: GrpcTransport, shell: Shell, draft: Draft, folder: Path
) -> StartingPoint:
    initial, target = draft.job.initial_model, folder / "model.safetensors"
    if initial.function:
        return await from_function(draft.folder, draft.job, target)
    if initial.file:
        return await from_file(draft.folder, draft.job, target)
    words = ["download_model", str(initial.run), str(initial.round)]
    model = data_of(await ask(transport, shell, words), "model")
    return StartingPoint(ModelRef(model["digest"], model["size"]))


async def _preflight(
    transport: GrpcTransport, shell: Shell, draft: Draft, sites: Sequence[str]
) -> list[Item]:
    """Return a row for each target site."""
    question = Question(
        job=draft.job.name,
        has_code=any(path.startswith(f"{CODE_FOLDER}/") for path in draft.files),
        data=draft.job.data,
        environment=draft.job.environment,
        sites=tuple(sites),
    )
    items = await ask(transport, shell, [PREFLIGHT, encode(question)])
    return [item for item in items if item["type"] == "row"]


def _check_answers(draft: Draft, answers: Sequence[Item]) -> tuple[str, ...]:
    """Return the target sites, or refuse a job that cannot reach its quorum."""
    unknown = [answer for answer in answers if answer["status"] == "unknown"]
    if unknown:
        raise InvalidArgumentError(
            f"{unknown[0]['target']} is an unknown {unknown[0]['detail']}", field="--sites"
        )
    sites = tuple(str(answer["target"]) for answer in answers)
    check_targets(sites, draft.quorum)
    refused = [answer for answer in answers if answer["status"] == "refused"]
    if len(sites) - len(refused) < draft.quorum:
        said = " · ".join(map(_said, refused))
        raise FailedPreconditionError(
            f"quorum {draft.quorum} of {len(sites)} sites cannot be reached: {said}",
            hint="lower it with --min, or have the sites change their policy",
        )
    return sites


def _plan(draft: Draft, start: StartingPoint, answers: Sequence[Item]) -> list[str]:
    job = draft.job
    model = f"model of run {job.initial_model.run} ({units.size(start.blob.size)})"
    if start.manifest is not None:
        size = units.size(start.manifest.size_bytes)
        tensors = units.count(len(start.manifest.tensors), "tensor")
        model = f"model {units.count(start.manifest.parameters, 'parameter')} in {tensors} ({size})"
    data = f"     data {', '.join(job.data)} at {len(answers)} sites" if job.data else ""
    return [
        f"plan      {', '.join(job.workflow)}; {job.rounds} rounds, "
        f"quorum {draft.quorum} of {len(answers)}, wait {job.wait_after_min_s:g} s after quorum, "
        f"deadline {job.round_deadline_s:g} s",
        f"          {model}{data}",
        f"accepts   {' · '.join(map(_said, answers))}",
    ]


def _said(answer: Item) -> str:
    words = {"ok": "ok", "no_reply": "no reply", "refused": "refused:", "error": "error:"}
    word = words.get(str(answer["status"]), str(answer["status"]))
    return f"{answer['target']} {word} {answer['detail']}".rstrip()


async def _send(
    transport: GrpcTransport,
    shell: Shell,
    draft: Draft,
    start: StartingPoint,
    sites: tuple[str, ...],
    folder: Path,
) -> int:
    """Pack, sign, upload and start; return the run's number."""
    kit, key = transport.credentials.kit, transport.credentials.key
    package = folder / "package.zip"
    admin, now = kit.admin, datetime.now(UTC)
    write_atomic(
        package,
        pack(
            draft.files,
            start.blob,
            project=admin.project,
            author=admin.name,
            job=draft.job.name,
            key=key,
            certificate=kit.chain,
        ),
    )
    blob = ModelRef(*digest_of_file(package))
    order = StartOrder(
        project=admin.project,
        issued_at=now,
        not_after=now + timedelta(seconds=ORDER_S),
        submission_id=draft.submission,
        job_digest=blob.digest.partition(":")[2],
        sites=sites,
    )
    shell.show(
        {
            "type": "text",
            "text": f"submission {draft.submission} (if the connection breaks: repeat with "
            "--submission and this id)",
        }
    )
    await _upload(transport, shell, package, blob, f"{draft.submission}/job")
    if start.path is not None:
        await _upload(transport, shell, start.path, start.blob, f"{draft.submission}/model")
    words = [SUBMIT, *(["--min", str(draft.given_quorum)] if draft.given_quorum else [])]
    signed = transport.credentials.sign(order)
    run = data_of(await persist(shell, lambda: ask(transport, shell, words, signed)), "run")
    sent = blob.size + (start.blob.size if start.path else 0)
    summary = f"uploaded {units.size(sent)} · signed by {admin.name} · run {run} started"
    shell.show({"type": "text", "text": summary})
    value = {"run": run, "submission": draft.submission, "sites": list(sites)}
    shell.show({"type": "data", "name": "submission", "value": value})
    return int(run)


async def _upload(
    transport: GrpcTransport, shell: Shell, path: Path, blob: ModelRef, transfer_id: str
) -> None:
    label = transfer_id.partition("/")[2]

    def progress(done: int) -> None:
        shell.show(
            {"type": "progress", "label": label, "done": done, "total": blob.size, "unit": "B"}
        )

    async def send(channel: aio.Channel, token: str) -> None:
        await send_blob(channel, path, blob, transfer_id, token=token, progress=progress)

    await persist(shell, lambda: transport.with_session(send))
