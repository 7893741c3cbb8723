"""From a job folder to two uploaded blobs, and a signed start: steps that local actions share."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from grpc import aio

from flplatform.admin.console.exchange import ask, data_of, persist
from flplatform.admin.console.starting_point import StartingPoint, from_file, from_function
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.core.errors import ConfigError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER, JOB_FILE, JobSpec, parse_job
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import write_atomic
from flplatform.hci.shell import Shell
from flplatform.rpc.transfers import send_blob
from flplatform.security.package import pack, read_job_folder
from flplatform.security.signing import StartOrder

ORDER_S = 86_400.0
"""How long sites may accept a start after it was signed."""


@dataclass(frozen=True, slots=True)
class Source:
    """A job as it lies in its folder.

    Attributes:
        folder: the job's.
        files: what is packed.
        job: the parsed `job.yml`.
    """

    folder: Path
    files: Mapping[str, bytes]
    job: JobSpec


@dataclass(frozen=True, slots=True)
class Packed:
    """A signed package, and the model that goes with it.

    Attributes:
        path: the package's file.
        blob: its digest and size.
        start: the initial model.
    """

    path: Path
    blob: ModelRef
    start: StartingPoint

    @property
    def upload_bytes(self) -> int:
        """How much is uploaded."""
        return self.blob.size + (self.start.blob.size if self.start.path else 0)


def read_source(word: str, transfer: Path) -> Source:
    """Read a job: a folder here, or of that name in the kit's `transfer` folder.

    Raises:
        ConfigError: there is no job, or `job.yml` is wrong.
        InvalidArgumentError: the code that it names is not there.
    """
    folder = Path(word).expanduser()
    if not folder.is_dir() and (transfer / folder).is_dir():
        folder = transfer / folder
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}, here or in {transfer}", hint="give a job folder's path"
        )
    files = read_job_folder(folder)
    job = parse_job(files[JOB_FILE].decode("utf-8", "replace"), str(folder / JOB_FILE))
    _check_executor(job, files)
    return Source(folder, files, job)


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


async def starting_point(
    transport: GrpcTransport, shell: Shell, source: Source, folder: Path
) -> StartingPoint:
    """Build, copy or find the initial model.

    Args:
        transport: the way to the server.
        shell: shows a refusal.
        source: the job.
        folder: where a model that is to be uploaded is put.

    Raises:
        Refused: it is a model of the server that the user may not have.
        FLError: there is none, or it is no model.
    """
    initial, target = source.job.initial_model, folder / "model.safetensors"
    if initial.function:
        return await from_function(source.folder, source.job, target)
    if initial.file:
        return await from_file(source.folder, source.job, target)
    words = ["download_model", str(initial.run), str(initial.round)]
    model = data_of(await ask(transport, shell, words), "model")
    return StartingPoint(ModelRef(model["digest"], model["size"]))


def pack_source(
    credentials: Credentials, source: Source, start: StartingPoint, folder: Path
) -> Packed:
    """Pack and sign a job into a file of `folder`."""
    admin, path = credentials.kit.admin, folder / "package.zip"
    data = pack(
        source.files,
        start.blob,
        project=admin.project,
        author=admin.name,
        job=source.job.name,
        key=credentials.key,
        certificate=credentials.kit.chain,
    )
    write_atomic(path, data)
    return Packed(path, ModelRef(*digest_of_file(path)), start)


def upload_id(author: str, name: str, model: ModelRef) -> str:
    """Return an id under which the same upload, begun again, goes on where it stopped."""
    return hashlib.sha256(f"{author}/{name}/{model.digest}".encode()).hexdigest()[:32]


async def upload(transport: GrpcTransport, shell: Shell, packed: Packed, transfer: str) -> None:
    """Upload package and model with progress, going on after a broken connection.

    Args:
        transport: the way to the server.
        shell: shows the progress.
        packed: what to upload.
        transfer: id of the transfers, 32 hex digits.

    Raises:
        FLError: the server refuses, or the connection stays broken.
    """
    await _send(transport, shell, packed.path, packed.blob, f"{transfer}/job")
    if packed.start.path is not None:
        await _send(transport, shell, packed.start.path, packed.start.blob, f"{transfer}/model")


async def _send(
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


def sign_start(
    credentials: Credentials,
    submission: str,
    package: ModelRef,
    sites: tuple[str, ...],
    gpus: Mapping[str, int],
    purpose: Literal["train", "validate"] = "train",
) -> bytes:
    """Sign the start of a package at sites.

    Args:
        credentials: of who signs.
        submission: id of the submission, 32 hex digits.
        package: what is started.
        sites: where.
        gpus: site -> processes there; 1 where absent.
        purpose: what the sites may be given to do.
    """
    now = datetime.now(UTC)
    order = StartOrder(
        project=credentials.kit.admin.project,
        issued_at=now,
        not_after=now + timedelta(seconds=ORDER_S),
        submission_id=submission,
        job_digest=package.digest.partition(":")[2],
        sites=sites,
        gpus=dict(gpus),
        purpose=purpose,
    )
    return credentials.sign(order)


def settings(job: JobSpec, quorum: int, sites: int) -> str:
    """Say in one line of a plan what the job does, with how many sites."""
    return (
        f"plan      {', '.join(job.workflow)}; {job.rounds} rounds, "
        f"quorum {quorum} of {sites}, wait {job.wait_after_min_s:g} s after quorum, "
        f"deadline {job.round_deadline_s:g} s"
    )


def processes(gpus: Mapping[str, int]) -> list[str]:
    """Say in a line of a plan how many processes work at sites; no line if nothing is special."""
    counted = " · ".join(f"{site} {number}" for site, number in sorted(gpus.items()))
    return [f"gpus      {counted}"] if gpus else []
