"""`submit_job`: check, build, ask, sign, upload, start."""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.packing import (
    Packed,
    Source,
    pack_source,
    processes,
    read_source,
    settings,
    sign_start,
    starting_point,
    upload,
)
from flplatform.admin.console.starting_point import StartingPoint
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.console.wait import follow
from flplatform.admin.gpus import gpus_at, parse_gpus
from flplatform.admin.modules.submission import PREFLIGHT, SUBMIT, Question, encode
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER, JobSpec, check_targets
from flplatform.files.scratch import scratch_folder
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.shell import Shell

_SUBMISSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A job on its way.

    Attributes:
        submission: its id; the server never runs one twice.
        source: the job's folder and files.
        quorum: updates that close a round.
        given_quorum: the quorum if the user set it.
        gpus: how many processes work at which sites, as typed.
    """

    submission: str
    source: Source
    quorum: int
    given_quorum: int | None
    gpus: tuple[str, ...]

    @property
    def job(self) -> JobSpec:
        """The parsed `job.yml`."""
        return self.source.job


async def submit_job(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Submit a job and return the exit code.

    Raises:
        FLError: what is wrong with the job, or why it is refused.
        OSError: a file cannot be read.
    """
    values = shell.parse(argv)
    draft = _draft(values, transport.credentials.kit.folder / "transfer")
    with scratch_folder("fl-submit-") as folder:
        try:
            start = await starting_point(transport, shell, draft.source, folder)
            answers = await preflight(
                transport,
                shell,
                question_of(draft.job, draft.source.files, values["sites"], draft.gpus),
            )
            sites = _check_answers(draft, answers)
            gpus = gpus_at(draft.gpus, sites)
            shell.show({"type": "text", "text": "\n".join(_plan(draft, start, answers, gpus))})
            willing = sum(answer["status"] == "ok" for answer in answers)
            question = f"{willing} of {len(sites)} sites would take part, quorum {draft.quorum}"
            if not await shell.confirm(f"{question}. Submit?"):
                shell.show({"type": "text", "text": "nothing was submitted"})
                return ExitCode.INTERRUPTED
            packed = pack_source(transport.credentials, draft.source, start, folder)
            run = await _send(transport, shell, draft, packed, sites, gpus)
        except Refused as refused:
            return refused.exit_code
    return await follow(transport, ["wait", str(run)], shell) if values["wait"] else ExitCode.OK


def _draft(values: Mapping[str, Any], transfer: Path) -> Draft:
    source = read_source(values["job"], transfer)
    submission = values["submission"] or secrets.token_hex(16)
    if not _SUBMISSION.fullmatch(submission):
        raise InvalidArgumentError("is not 32 hex digits", field="--submission")
    parse_gpus(values["gpus"])  # a slip is told before anything is built
    given = values["min"]
    quorum = given or source.job.min_clients
    return Draft(submission, source, quorum, given, tuple(values["gpus"]))


def question_of(
    job: JobSpec, files: Collection[str], sites: Sequence[str], gpus: Sequence[str] = ()
) -> Question:
    """Return what sites are asked before a job is started; `gpus` as typed."""
    everywhere, named = parse_gpus(gpus)
    return Question(
        job=job.name,
        has_code=any(path.startswith(f"{CODE_FOLDER}/") for path in files),
        data=job.data,
        environment=job.environment,
        sites=tuple(sites),
        gpus=dict(named),
        processes=everywhere or 1,
    )


async def preflight(transport: GrpcTransport, shell: Shell, question: Question) -> list[Item]:
    """Return a row for each site that is asked whether it would take part.

    Raises:
        Refused: the server refuses to ask.
        FLError: as `ask`.
    """
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


def _plan(
    draft: Draft, start: StartingPoint, answers: Sequence[Item], gpus: Mapping[str, int]
) -> list[str]:
    job = draft.job
    model = f"model of run {job.initial_model.run} ({units.size(start.blob.size)})"
    if start.manifest is not None:
        size = units.size(start.manifest.size_bytes)
        tensors = units.count(len(start.manifest.tensors), "tensor")
        model = f"model {units.count(start.manifest.parameters, 'parameter')} in {tensors} ({size})"
    data = f"     data {', '.join(job.data)} at {len(answers)} sites" if job.data else ""
    return [
        settings(job, draft.quorum, len(answers)),
        f"          {model}{data}",
        *processes(gpus),
        accepts(answers),
    ]


def accepts(answers: Sequence[Item]) -> str:
    """Say in a line of a plan what the sites have answered."""
    return f"accepts   {' · '.join(map(_said, answers))}"


def _said(answer: Item) -> str:
    words = {"ok": "ok", "no_reply": "no reply", "refused": "refused:", "error": "error:"}
    word = words.get(str(answer["status"]), str(answer["status"]))
    return f"{answer['target']} {word} {answer['detail']}".rstrip()


async def _send(
    transport: GrpcTransport,
    shell: Shell,
    draft: Draft,
    packed: Packed,
    sites: tuple[str, ...],
    gpus: Mapping[str, int],
) -> int:
    """Sign, upload and start; return the run's number."""
    signed = sign_start(transport.credentials, draft.submission, packed.blob, sites, gpus)
    shell.show(
        {
            "type": "text",
            "text": f"submission {draft.submission} (should the connection break: --submission ID)",
        }
    )
    await upload(transport, shell, packed, draft.submission)
    words = [SUBMIT, *(["--min", str(draft.given_quorum)] if draft.given_quorum else [])]
    run = data_of(await persist(shell, lambda: ask(transport, shell, words, signed)), "run")
    author = transport.credentials.kit.admin.name
    size = units.size(packed.upload_bytes)
    summary = f"uploaded {size} · signed by {author} · run {run} started"
    shell.show({"type": "text", "text": summary})
    value = {"run": run, "submission": draft.submission, "sites": list(sites)}
    shell.show({"type": "data", "name": "submission", "value": value})
    return int(run)
