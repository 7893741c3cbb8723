"""`download_model`: one global model into one file, whole or not at all."""

import asyncio
import os
import tempfile
from pathlib import Path

from grpc import aio

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.transport import GrpcTransport
from flplatform.core.errors import AlreadyExistsError
from flplatform.core.messages import ModelRef
from flplatform.files.durable import PRIVATE_FILE, fsync_dir, private_dir
from flplatform.files.modelfile import read_layout
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell
from flplatform.rpc.streams import fetch_blob
from flplatform.store.blobs import FileBlobStore


async def download_model(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Download a model and return the exit code.

    Raises:
        AlreadyExistsError: the file exists.
        FLError: the server refuses, or the bytes are not what their digest says.
        OSError: the file cannot be written.
    """
    values = shell.parse(argv)
    try:
        items = await persist(shell, lambda: ask(transport, shell, argv))
    except Refused as refused:
        return refused.exit_code
    model = data_of(items, "model")
    target = Path(values["to"]).expanduser() if values["to"] else _default(transport, model)
    if target.exists():
        raise AlreadyExistsError(f"{target} exists", hint="give another name with --to")
    blob = ModelRef(model["digest"], model["size"])
    with tempfile.TemporaryDirectory(prefix=".fl-download-", dir=target.parent) as folder:
        fetched = await _fetch(transport, shell, blob, Path(folder))
        parameters = read_layout(fetched).manifest.parameters
        _name(fetched, target)
    size = units.size(blob.size)
    text = f"round {model['round']}, {units.count(parameters, 'parameter')} ({size}) in {target}"
    shell.show({"type": "text", "text": text})
    shell.show({"type": "data", "name": "model", "value": {**model, "file": str(target)}})
    return ExitCode.OK


def _default(transport: GrpcTransport, model: dict[str, int]) -> Path:
    folder = private_dir(transport.credentials.kit.folder / "transfer")
    return folder / f"run-{model['run']}-round-{model['round']}.safetensors"


async def _fetch(transport: GrpcTransport, shell: Shell, blob: ModelRef, folder: Path) -> Path:
    """Download into a folder beside the target; its digest is checked there."""
    blobs = await asyncio.to_thread(FileBlobStore, folder)

    def progress(done: int) -> None:
        shell.show(
            {"type": "progress", "label": "model", "done": done, "total": blob.size, "unit": "B"}
        )

    async def fetch(channel: aio.Channel, token: str) -> Path:
        return await fetch_blob(channel, blob, blobs, token=token, progress=progress)

    return await persist(shell, lambda: transport.with_session(fetch))


def _name(source: Path, target: Path) -> None:
    """Give a file its final name, which nobody else may have taken."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
    except FileExistsError:
        raise AlreadyExistsError(f"{target} exists", hint="give another name with --to") from None
    source.chmod(PRIVATE_FILE)
    os.replace(source, target)
    fsync_dir(target.parent)
