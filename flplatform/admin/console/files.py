"""Files at the console: the local folder, uploads, and downloads that stay where they belong.

A server that lies gains nothing: names are checked again here, every byte is held against its
digest, and nothing is written but new files below one folder of the user's choice.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from grpc import aio

from flplatform.admin import units
from flplatform.admin.console.exchange import Refused, ask, data_of, persist
from flplatform.admin.console.local_folder import lcd, lls, local_folder, local_path, lpwd
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.modules.files import ANNOUNCE, MAX_CONTENT_BYTES
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import check_digest
from flplatform.files.digest import digest_of, digest_of_file
from flplatform.files.durable import PRIVATE_DIR, PRIVATE_FILE, fsync_dir, private_dir
from flplatform.files.names import check_component, check_path, collision
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.shell import Shell
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.store.blobs import FileBlobStore

MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Offered:
    """One file that the server offers, checked.

    Attributes:
        name: relative, in the grammar of `files.names`.
        blob: digest and size.
        content: the bytes, if they came with the offer.
    """

    name: str
    blob: ModelRef
    content: bytes | None


# ---- what is on the server ----


async def info(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Show where files come from and go to, then what the server has."""
    folder = str(local_folder(transport, shell))
    text = f"uploads come from, and downloads go to  {folder}\nuploads go to  transfer/"
    shell.show({"type": "text", "text": text})
    shell.show({"type": "data", "name": "folder", "value": folder})
    return await shell.remote(argv)


async def upload_file(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Upload one file and return the exit code; what arrived before a cut is not sent again.

    Raises:
        FLError: the name is none, or the server refuses.
        OSError: the file cannot be read.
    """
    values = shell.parse(argv)
    path = local_path(transport, shell, values["local"])
    if not path.is_file():
        raise NotFoundError(f"{path} is no file")
    name = (values["name"] or path.name).removeprefix("transfer/")
    check_path(name, "NAME")
    digest, size = await asyncio.to_thread(digest_of_file, path)
    blob = ModelRef(digest, size)
    if not size:
        raise InvalidArgumentError("is empty; there is nothing to upload", field="LOCAL")

    async def step() -> None:
        announced = await ask(transport, shell, [ANNOUNCE, name, digest, str(size)])
        transfer_id = data_of(announced, "transfer_id")

        async def send(channel: aio.Channel, token: str) -> None:
            progress = partial(_progress, shell, name, size, 0)
            await send_blob(channel, path, blob, transfer_id, token=token, progress=progress)

        await transport.with_session(send)

    try:
        await persist(shell, step)
    except Refused as refused:
        return refused.exit_code
    value = {"name": f"transfer/{name}", "size": size, "digest": digest, "file": str(path)}
    shell.show({"type": "text", "text": f"transfer/{name} ({units.size(size)}) on the server"})
    shell.show({"type": "data", "name": "file", "value": value})
    return ExitCode.OK


def _progress(shell: Shell, label: str, total: int, before: int, done: int) -> None:
    item = {"type": "progress", "label": label, "done": before + done, "total": total, "unit": "B"}
    shell.show(item)


# ---- downloads ----


async def download_file(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Download one file and return the exit code.

    Raises:
        AlreadyExistsError: the target exists.
        FLError: the server refuses, or what it sends is not what it said.
        OSError: the file cannot be written.
    """
    values = shell.parse(argv)
    name = values["name"]
    folder = local_folder(transport, shell)
    target = local_path(transport, shell, values["to"]) if values["to"] else folder / _last(name)
    if target.is_dir() and values["to"]:
        target = target / _last(name)
    _demand_new(target)
    with _parts(target.parent, transport, name) as parts:

        async def step() -> tuple[Offered, Path | None]:
            offers = _offers(await ask(transport, shell, ["download_file", name]), name, True)
            (offer,) = offers
            show = partial(_progress, shell, offer.name, offer.blob.size, 0)
            return offer, await _fetch(transport, offer, parts, show)

        try:
            offer, source = await persist(shell, step)
        except Refused as refused:
            return refused.exit_code
        place_file(offer, source, target)
    _say_downloaded(shell, [(offer, target)], target)
    return ExitCode.OK


async def download_folder(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Download all files of a folder into a new one, whole or not at all; return the exit code.

    Raises:
        AlreadyExistsError: the target exists.
        FLError: the server refuses, or what it sends is not what it said.
        OSError: a file cannot be written.
    """
    values = shell.parse(argv)
    name = values["name"].removesuffix("/")
    default = local_folder(transport, shell) / _folder_name(name)
    target = local_path(transport, shell, values["to"]) if values["to"] else default
    _demand_new(target)
    with _parts(target.parent, transport, name) as parts:

        async def step() -> list[tuple[Offered, Path | None]]:
            offers = _offers(await ask(transport, shell, ["download_folder", name]), name, False)
            whole, before = sum(offer.blob.size for offer in offers), 0
            fetched: list[tuple[Offered, Path | None]] = []
            for offer in offers:
                # one bar for all: a run has a file for each round
                show = partial(_progress, shell, name, whole, before)
                fetched.append((offer, await _fetch(transport, offer, parts, show)))
                before += offer.blob.size
                _progress(shell, name, whole, before, 0)
            return fetched

        try:
            fetched = await persist(shell, step)
        except Refused as refused:
            return refused.exit_code
        await asyncio.to_thread(_place_folder, fetched, parts / "tree", target)
    placed = [(offer, target / offer.name) for offer, _ in fetched]
    _say_downloaded(shell, placed, target)
    return ExitCode.OK


def _last(name: str) -> str:
    return check_component(name.removesuffix("/").rpartition("/")[2], "NAME")


def _folder_name(name: str) -> str:
    """Name the folder that a download makes: `runs/7` becomes `run-7`."""
    parts = check_path(name, "NAME")
    if parts[0] == "runs" and len(parts) > 1:
        return "-".join(("run", *parts[1:]))
    return parts[-1]


def _demand_new(target: Path) -> None:
    if os.path.lexists(target):
        raise AlreadyExistsError(f"{target} exists", hint="give another name with --to")
    if not target.parent.is_dir():
        raise NotFoundError(f"{target.parent} is no folder")


@contextmanager
def _parts(beside: Path, transport: GrpcTransport, name: str) -> Iterator[Path]:
    """Hold the folder in which a download collects what has come; kept if it is cut.

    Raises:
        FailedPreconditionError: another console works in it.
    """
    identity = transport.credentials.kit.identity
    key = sha256(f"{identity.project}\n{identity.name}\n{name}".encode()).hexdigest()[:16]
    folder = private_dir(beside / f".fl-download-{key}")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(f"another console downloads {name} to {beside}") from None
        shutil.rmtree(folder / "tree", ignore_errors=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _offers(items: list[Item], name: str, single: bool) -> list[Offered]:
    """Check what the server offers for a name.

    Raises:
        DataLossError: contents are not what their digest says.
        InvalidArgumentError: a name leads elsewhere, or something is malformed.
    """
    listing = data_of(items, "files")
    if not isinstance(listing, list) or not 0 < len(listing) <= MAX_FILES:
        raise InvalidArgumentError("the server's list of files cannot be read", field="files")
    if single and len(listing) != 1:
        raise InvalidArgumentError("the server offers more than the one file", field="files")
    contents: dict[str, list[str]] = {}
    for item in items:
        label = str(item.get("name", ""))
        if item["type"] == "data" and label.startswith("content "):
            contents.setdefault(label.removeprefix("content "), []).append(str(item["value"]))
    offers: dict[str, Offered] = {}
    for entry in listing:
        offer = _offer(entry, name, contents, single)
        if offer.name in offers or collision(offer.name, offers):
            raise InvalidArgumentError(f"{offer.name} is offered twice", field="files")
        offers[offer.name] = offer
    return list(offers.values())


def _offer(entry: object, name: str, contents: Mapping[str, list[str]], single: bool) -> Offered:
    match entry:
        case {"name": str(full), "digest": str(digest), "size": int(size), "made": bool(made)}:
            blob = ModelRef(check_digest(digest), size)
        case _:
            raise InvalidArgumentError("the server's list of files cannot be read", field="files")
    prefix = "" if single else f"{name}/"
    if (single and full != name) or not full.startswith(prefix):
        raise InvalidArgumentError(f"the server offers {full[:80]!r} for {name}", field="files")
    relative = _last(full) if single else full.removeprefix(prefix)
    check_path(relative, "files")
    if not made:
        return Offered(relative, blob, None)
    content = "".join(contents.get(full, [])).encode()
    if len(content) > MAX_CONTENT_BYTES or (digest_of(content), len(content)) != (digest, size):
        raise DataLossError(f"the contents of {full} are not what the server says they are")
    return Offered(relative, blob, content)


async def _fetch(
    transport: GrpcTransport, offer: Offered, parts: Path, progress: Callable[[int], None]
) -> Path | None:
    """Return the file that holds an offer's blob, None if its content is in hand already."""
    if offer.content is not None:
        return None
    blobs = await asyncio.to_thread(FileBlobStore, parts / "blobs")

    async def fetch(channel: aio.Channel, token: str) -> Path:
        return await fetch_blob(channel, offer.blob, blobs, token=token, progress=progress)

    return await transport.with_session(fetch)


def place_file(offer: Offered, source: Path | None, target: Path) -> None:
    """Give a fetched file its final name, which nobody may have taken.

    Raises:
        AlreadyExistsError: somebody has.
        OSError: it cannot be written.
    """
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE_FILE)
    except FileExistsError:
        raise AlreadyExistsError(f"{target} exists", hint="give another name with --to") from None
    with os.fdopen(handle, "wb") as file:
        if offer.content is not None:
            file.write(offer.content)
            file.flush()
            os.fsync(file.fileno())
        elif source is not None:
            source.chmod(PRIVATE_FILE)
            os.replace(source, target)
    fsync_dir(target.parent)


def _place_folder(fetched: list[tuple[Offered, Path | None]], tree: Path, target: Path) -> None:
    """Lay fetched files out below a fresh folder, then give that its final name."""
    tree.mkdir(PRIVATE_DIR)
    wanted = [source for _, source in fetched if source is not None]
    for offer, source in fetched:
        place = tree.joinpath(*check_path(offer.name, "files"))
        place.parent.mkdir(PRIVATE_DIR, parents=True, exist_ok=True)
        if source is not None:
            wanted.remove(source)
            if source in wanted:  # another name has the same bytes
                shutil.copyfile(source, copy := source.with_name(f".copy-{source.name}"))
                source = copy  # noqa: PLW2901
        place_file(offer, source, place)
    try:
        target.mkdir(PRIVATE_DIR)
    except FileExistsError:
        raise AlreadyExistsError(f"{target} exists", hint="give another name with --to") from None
    os.replace(tree, target)
    fsync_dir(target.parent)


def _say_downloaded(shell: Shell, placed: list[tuple[Offered, Path]], target: Path) -> None:
    total = sum(offer.blob.size for offer, _ in placed)
    rows = [[offer.name, offer.blob.size] for offer, _ in placed]
    if len(placed) > 1:
        columns = ["name", "size_bytes"]
        shell.show({"type": "table", "name": "files", "columns": columns, "rows": rows})
    text = f"{units.count(len(placed), 'file')} ({units.size(total)}) in {target}"
    shell.show({"type": "text", "text": text})
    value = [
        {
            "name": offer.name,
            "size": offer.blob.size,
            "digest": offer.blob.digest,
            "file": str(path),
        }
        for offer, path in placed
    ]
    shell.show({"type": "data", "name": "files", "value": value})


Action = Callable[[GrpcTransport, list[str], Shell], Awaitable[int]]

ACTIONS: Mapping[str, Action] = {
    "upload_file": upload_file,
    "download_file": download_file,
    "download_folder": download_folder,
    "info": info,
    "lpwd": lpwd,
    "lls": lls,
    "lcd": lcd,
}
