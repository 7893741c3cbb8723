"""The local folder of a console: uploads come from it, downloads go to it."""

import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flplatform.admin.console.transport import GrpcTransport
from flplatform.core.errors import NotFoundError
from flplatform.files.durable import private_dir
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell

FOLDER = "local folder"
"""Key under which a shell remembers where `lcd` went."""

MAX_LISTED = 1000


def local_folder(transport: GrpcTransport, shell: Shell) -> Path:
    """Return the local folder: the kit's `transfer`, or where `lcd` went."""
    remembered = shell.remembered.get(FOLDER)
    if remembered is not None:
        return Path(remembered)
    return private_dir(transport.credentials.kit.folder / "transfer")


def local_path(transport: GrpcTransport, shell: Shell, path: str) -> Path:
    """Return what a path typed at the console means: relative to the local folder."""
    return local_folder(transport, shell) / Path(path).expanduser()


async def lpwd(transport: GrpcTransport, _argv: list[str], shell: Shell) -> int:
    """Show the local folder."""
    return _say_folder(local_folder(transport, shell), shell)


async def lcd(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Change the local folder; without a path, back to the kit's.

    Raises:
        NotFoundError: there is no such folder.
    """
    path = shell.parse(argv)["path"]
    if not path:
        shell.remembered.pop(FOLDER, None)
        return _say_folder(local_folder(transport, shell), shell)
    folder = local_path(transport, shell, path).resolve()
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder")
    shell.remembered[FOLDER] = str(folder)
    return _say_folder(folder, shell)


def _say_folder(folder: Path, shell: Shell) -> int:
    shell.show({"type": "text", "text": str(folder)})
    shell.show({"type": "data", "name": "folder", "value": str(folder)})
    return ExitCode.OK


async def lls(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """List a local folder.

    Raises:
        OSError: it cannot be read.
    """
    folder = local_path(transport, shell, shell.parse(argv)["path"])
    rows: list[list[Any]] = []
    for entry in sorted(folder.iterdir(), key=lambda path: path.name)[:MAX_LISTED]:
        status = entry.lstat()
        when = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
        is_folder = stat.S_ISDIR(status.st_mode)
        name = entry.name + "/" * is_folder
        rows.append([name, None if is_folder else status.st_size, when.replace("+00:00", "Z")])
    columns = ["name", "size_bytes", "changed_at"]
    shell.show({"type": "table", "name": "local", "columns": columns, "rows": rows})
    entries = [dict(zip(("name", "size", "changed"), row, strict=True)) for row in rows]
    shell.show({"type": "data", "name": "local", "value": entries})
    return ExitCode.OK
