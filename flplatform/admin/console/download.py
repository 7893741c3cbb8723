"""`download_model`: one global model into one file, whole or not at all."""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpc import aio

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.transport import GrpcTransport
from flplatform.core.errors import AlreadyExistsError, InvalidArgumentError
from flplatform.core.messages import ModelRef
from flplatform.core.ports import BlobStore
from flplatform.files.durable import PRIVATE_FILE, fsync_dir, private_dir
from flplatform.files.modelfile import read_layout
from flplatform.files.scratch import scratch_folder
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell
from flplatform.rpc.transfers import fetch_blob
from flplatform.store.blobs import FileBlobStore


async def download_model(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Download a model and return the exit code.

    Raises:
        AlreadyExistsError: the file exists.
        FLError: the server refuses, or the bytes are not what their digest says.
        OSError: the file cannot be written.
    """
    to = shell.parse(argv)["to"]
    target = Path(to).expanduser() if to else None
    if target is not None and target.is_dir():
        beside, target = target, None
    else:
        beside = target.parent if target else _transfer_folder(transport)

    def place(model: Mapping[str, Any]) -> Path:
        name = f"run-{model['run']}-round-{model['round']}.safetensors"
        return target or beside / name

    if target is not None and target.exists():
        raise _exists(target)
    if not os.access(beside, os.W_OK | os.X_OK):
        problem = "cannot be written to" if beside.is_dir() else "is no folder"
        raise InvalidArgumentError(f"{beside} {problem}", field="--to")
    with scratch_folder(".fl-model-", beside) as folder:
        blobs = await asyncio.to_thread(FileBlobStore, folder)
        try:
            model, file = await persist(shell, lambda: _fetch(transport, shell, argv, blobs, place))
        except Refused as refused:
            return refused.exit_code
        parameters = read_layout(file).manifest.parameters
        target = place(model)
        _name(file, target)
    size = units.size(model["size"])
    text = f"round {model['round']}, {units.count(parameters, 'parameter')} ({size}) in {target}"
    shell.show({"type": "text", "text": text})
    shell.show({"type": "data", "name": "model", "value": {**model, "file": str(target)}})
    return ExitCode.OK


def _transfer_folder(transport: GrpcTransport) -> Path:
    return private_dir(transport.credentials.kit.folder / "transfer")


async def _fetch(
    transport: GrpcTransport,
    shell: Shell,
    argv: list[str],
    blobs: BlobStore,
    place: Callable[[Mapping[str, Any]], Path],
) -> tuple[dict[str, Any], Path]:
    """Have the model granted and download it, going on where the last try ended.

    A grant ends with its session, so that every try begins by asking for one.
    """
    model = data_of(await ask(transport, shell, argv), "model")
    if os.path.lexists(place(model)):  # told before anything is downloaded
        raise _exists(place(model))
    blob = ModelRef(model["digest"], model["size"])

    def progress(done: int) -> None:
        shell.show(
            {"type": "progress", "label": "model", "done": done, "total": blob.size, "unit": "B"}
        )

    async def fetch(channel: aio.Channel, token: str) -> Path:
        return await fetch_blob(channel, blob, blobs, token=token, progress=progress)

    return model, await transport.with_session(fetch)


def _exists(target: Path) -> AlreadyExistsError:
    return AlreadyExistsError(f"{target} exists", hint="give another name with --to")


def _name(source: Path, target: Path) -> None:
    """Give a file its final name, which nobody else may have taken."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
    except FileExistsError:
        raise _exists(target) from None
    source.chmod(PRIVATE_FILE)
    os.replace(source, target)
    fsync_dir(target.parent)
