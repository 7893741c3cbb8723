"""Files: what users keep on the server, and what runs have brought."""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.admin.ports import Control
from flplatform.admin.transfers import Transfers
from flplatform.admin.user_files import file_transfer
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from flplatform.core.files_view import RunFile
from flplatform.core.messages import ModelRef
from flplatform.files.names import check_path
from flplatform.hci import SESSION_RIGHT, CommandSpec, Connection, NoArguments, argument

ANNOUNCE = "announce_file"
"""Verb that the console sends and no user types."""

OWN = "transfer"
MAX_CONTENT_BYTES = 64 << 20
PIECE_CHARS = 256 << 10
"""Characters of one reply item."""

_RUN = re.compile(r"[1-9][0-9]{0,8}")


def locate(name: str, folders: bool = False) -> tuple[int | None, str]:
    """Find what a name in the tree means: `transfer/…`, or `runs/N/…`.

    Args:
        name: as typed.
        folders: whether `transfer` and `runs/N` themselves will do.

    Returns:
        The run, None for the user's own files; and the rest of the name, empty for all of it.

    Raises:
        InvalidArgumentError: it means nothing.
    """
    root, *rest = check_path(name.removesuffix("/"), "NAME")
    if root == OWN and (rest or folders):
        return None, "/".join(rest)
    if root == "runs" and rest and _RUN.fullmatch(rest[0]) and (rest[1:] or folders):
        return int(rest[0]), "/".join(rest[1:])
    wanted = (
        "transfer, transfer/FOLDER, runs/N or runs/N/FOLDER"
        if folders
        else ("transfer/FILE or runs/N/FILE")
    )
    raise InvalidArgumentError(f"{name[:80]!r} is not {wanted}", field="NAME")


@dataclass(frozen=True)
class _Named:
    name: str

    @property
    def source_run(self) -> int | None:
        """The run whose files they are; None for the user's own."""
        return locate(self.name, folders=True)[0]


_TO = "default in the local folder, see lpwd"


@dataclass(frozen=True)
class DownloadFile(_Named):
    """Of `download_file`."""

    name: str = argument(help="transfer/FILE or runs/N/FILE", metavar="NAME")
    to: str = argument(
        help=f"the file to make; {_TO}",
        option="--to",
        complete="path",
        metavar="FILE",
        default="",
    )


@dataclass(frozen=True)
class DownloadFolder(_Named):
    """Of `download_folder`."""

    name: str = argument(help="runs/N, transfer, or a folder in them", metavar="NAME")
    to: str = argument(
        help=f"the folder to make; {_TO}",
        option="--to",
        complete="path",
        metavar="DIR",
        default="",
    )


@dataclass(frozen=True)
class Info(_Named):
    """Of `info`."""

    name: str = argument(help="runs/N, transfer, or a folder in them", metavar="NAME", default=OWN)


@dataclass(frozen=True)
class _Own:
    @property
    def source_run(self) -> int | None:
        """None: these are the user's own files."""
        return None


@dataclass(frozen=True)
class UploadFile(_Own):
    """Of `upload_file`."""

    local: str = argument(help="the file to upload", complete="path", metavar="LOCAL")
    name: str = argument(
        help="its name below transfer/; default the same", metavar="NAME", default=""
    )


@dataclass(frozen=True)
class Announce(_Own):
    """Of `announce_file`."""

    name: str = argument(help="the name below transfer/")
    digest: str = argument(help="blake3:HEX")
    size: int = argument(help="bytes", minimum=1)


@dataclass(frozen=True)
class DeleteFile(_Own):
    """Of `delete_file`."""

    name: str = argument(help="one of your files on the server", metavar="transfer/FILE")


@dataclass(frozen=True)
class LocalPath:
    """Of `lls` and `lcd`."""

    path: str = argument(help="default the local folder", complete="path", default="")


class FilesModule:
    """Upload, download, listing.

    Args:
        control: knows what runs have brought.
        transfers: grants downloads, admits uploads, keeps users' files.
    """

    name = "files"
    summary = "files on the server and in the console's folder"

    def __init__(self, control: Control, transfers: Transfers) -> None:
        self._control = control
        self._transfers = transfers
        self._user_files = transfers.user_files

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands."""
        return [*self._on_the_server(), *_local()]

    def _on_the_server(self) -> Sequence[CommandSpec[Any]]:
        return [
            CommandSpec(
                name="upload_file",
                summary="keeps a file on the server, for yourself",
                arguments=UploadFile,
                handler=_console_only,
                permission="files",
                mutating=True,
                examples=("upload_file notes.txt", "upload_file big.bin data/big.bin"),
                states="always; an upload that was cut goes on where it stopped",
                local="upload_file",
            ),
            CommandSpec(
                name="download_file",
                summary="downloads one file of yours or of a run",
                arguments=DownloadFile,
                handler=self._download_file,
                permission="files",
                mutating=False,
                examples=(
                    "download_file transfer/notes.txt",
                    "download_file runs/7/metrics.csv --to m.csv",
                ),
                states="always; a run that goes on gives what it has",
                local="download_file",
            ),
            CommandSpec(
                name="download_folder",
                summary="downloads all files of a run, or of yours",
                arguments=DownloadFolder,
                handler=self._download_folder,
                permission="files",
                mutating=False,
                examples=("download_folder runs/7", "download_folder runs/7/models --to models"),
                states="always; a run that goes on gives what it has",
                local="download_folder",
            ),
            CommandSpec(
                name="info",
                summary="shows where files come from and go to, and what there is",
                arguments=Info,
                handler=self._info,
                permission="files",
                mutating=False,
                examples=("info", "info runs/7"),
                states="always",
                local="info",
            ),
            CommandSpec(
                name="delete_file",
                summary="deletes one of your files on the server",
                arguments=DeleteFile,
                handler=self._delete_file,
                permission="files",
                mutating=True,
                examples=("delete_file transfer/notes.txt",),
                states="always",
                confirm=self._confirm_delete,
            ),
            CommandSpec(
                name=ANNOUNCE,
                summary="says what will be uploaded",
                arguments=Announce,
                handler=self._announce,
                permission="files",
                mutating=True,
                examples=(f"{ANNOUNCE} notes.txt blake3:00 1",),
            ),
        ]

    # ---- handlers ----

    async def _download_file(self, connection: Connection, args: DownloadFile) -> None:
        run, name = locate(args.name)
        files = await self._files(connection, run)
        if name not in files:
            raise NotFoundError(
                f"there is no {args.name}", hint=f"info {_folder(run)} shows what there is"
            )
        await self._grant(connection, _folder(run), [files[name]])

    async def _download_folder(self, connection: Connection, args: DownloadFolder) -> None:
        run, name = locate(args.name, folders=True)
        files = _below(await self._files(connection, run), name)
        if not files:
            raise NotFoundError(
                f"there is no folder {args.name}", hint=f"info {_folder(run)} shows what there is"
            )
        await self._grant(connection, _folder(run), files)

    async def _info(self, connection: Connection, args: Info) -> None:
        run, name = locate(args.name, folders=True)
        found = await self._files(connection, run)
        whole = {file.name for file in _below(found, name)}
        rows: list[tuple[str, int, str]] = []
        if run is None:
            for each in await asyncio.to_thread(self._user_files.files, connection.session.user):
                if each.name in whole or not each.whole and not name:
                    state = "" if each.whole else "not all of it has arrived"
                    rows.append((f"{OWN}/{each.name}", each.blob.size, state))
        else:
            rows = [(f"{_folder(run)}/{each}", found[each].blob.size, "") for each in sorted(whole)]
        if rows:
            await connection.table("files", ("name", "size_bytes", "state"), rows)
        else:
            await connection.text(f"there is nothing in {args.name}")
        columns = ("name", "size", "state")
        await connection.data("files", [dict(zip(columns, row, strict=True)) for row in rows])

    async def _announce(self, connection: Connection, args: Announce) -> None:
        user, blob = connection.session.user, ModelRef(args.digest, args.size)
        await asyncio.to_thread(self._user_files.announce, user, args.name, blob)
        await connection.data("transfer_id", file_transfer(user, blob.digest))

    async def _delete_file(self, connection: Connection, args: DeleteFile) -> None:
        name = _own_name(args.name)
        file = await asyncio.to_thread(self._user_files.delete, connection.session.user, name)
        await connection.row(f"{OWN}/{name}", {"size_bytes": file.blob.size})

    async def _confirm_delete(self, args: DeleteFile) -> str:
        return f"delete {OWN}/{_own_name(args.name)} on the server. Continue?"

    # ---- what there is ----

    async def _files(self, connection: Connection, run: int | None) -> Mapping[str, RunFile]:
        """Return the files of a run, or of the user that have arrived whole, by their names."""
        if run is not None:
            return {file.name: file for file in await self._control.files.of_run(run)}
        mine = await asyncio.to_thread(self._user_files.files, connection.session.user)
        return {file.name: RunFile(file.name, file.blob) for file in mine if file.whole}

    async def _grant(self, connection: Connection, folder: str, files: Iterable[RunFile]) -> None:
        """Grant blobs, and send the contents of what is none, in pieces."""
        listing: list[dict[str, str | int | bool]] = []
        for file in files:
            made = file.content is not None
            listing.append(
                {
                    "name": f"{folder}/{file.name}",
                    "digest": file.blob.digest,
                    "size": file.blob.size,
                    "made": made,
                }
            )
            if not made:
                self._transfers.grant(connection.session, file.blob.digest)
        await connection.data("files", listing)
        for file in files:
            if file.content is not None:
                await _send(connection, f"{folder}/{file.name}", file.content)


async def _send(connection: Connection, name: str, content: bytes) -> None:
    if len(content) > MAX_CONTENT_BYTES:
        raise ResourceExhaustedError(f"{name} is larger than {MAX_CONTENT_BYTES} bytes")
    text = content.decode()
    for start in range(0, len(text), PIECE_CHARS):
        await connection.data(f"content {name}", text[start : start + PIECE_CHARS])


def _below(files: Mapping[str, RunFile], name: str) -> list[RunFile]:
    """Return the files of a folder, all of them for the empty name, in name order."""
    return [file for each, file in sorted(files.items()) if not name or each.startswith(f"{name}/")]


def _folder(run: int | None) -> str:
    return OWN if run is None else f"runs/{run}"


def _own_name(name: str) -> str:
    run, own = locate(name)
    if run is not None:
        raise InvalidArgumentError("files of runs stay as long as their runs", field="NAME")
    return own


def _local() -> Sequence[CommandSpec[Any]]:
    """Return the commands that the console carries out by itself."""
    return [
        CommandSpec(
            name=name,
            summary=summary,
            arguments=arguments,
            handler=_console_only,
            permission=SESSION_RIGHT,
            mutating=False,
            examples=(example,),
            states="always",
            local=name,
        )
        for name, summary, arguments, example in (
            (
                "lpwd",
                "shows the local folder: uploads from it, downloads to it",
                NoArguments,
                "lpwd",
            ),
            ("lls", "lists a local folder", LocalPath, "lls"),
            ("lcd", "changes the local folder", LocalPath, "lcd /tmp"),
        )
    ]


async def _console_only(_: Connection, __: object) -> None:
    raise FailedPreconditionError("this command belongs to the console, not to the server")
