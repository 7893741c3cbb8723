"""The closed table of what the console does itself, beyond what every console does.

Each action imports its module when it is first used: they need NumPy, which most commands can do
without, and a console that answers one command should do so at once.
"""

# ruff: noqa: PLC0415

from collections.abc import Mapping
from functools import partial

from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.console.wait import follow
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci.shell import LocalAction, Shell

FILE_ACTIONS = (
    "upload_file",
    "download_file",
    "download_folder",
    "info",
    "lpwd",
    "lls",
    "lcd",
)


def actions(transport: GrpcTransport) -> Mapping[str, LocalAction]:
    """Return the actions by the name that a command's spec gives.

    Args:
        transport: the way to the server.
    """

    async def submit(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.submit import submit_job

        return await submit_job(transport, argv, shell)

    async def upload(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.upload import upload_folder

        return await upload_folder(transport, argv, shell)

    async def begin(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.start import start

        return await start(transport, argv, shell)

    async def measure(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.validate import validate

        return await validate(transport, argv, shell)

    async def download(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.download import download_model

        return await download_model(transport, argv, shell)

    async def files(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.files import ACTIONS

        return await ACTIONS[shell.view(argv[0]).local](transport, argv, shell)

    async def dashboard(argv: list[str], shell: Shell) -> int:
        try:
            from flplatform.admin.console.dashboard import dashboard as show
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "textual":
                raise
            raise FailedPreconditionError(
                "the dashboard needs Textual, which is not installed here",
                hint="pip install 'flplatform[dashboard]'",
            ) from None
        return await show(transport, argv, shell)

    async def deny(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.revoke import revoke

        return await revoke(transport, argv, shell)

    async def change_passphrase(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.passwd import passwd

        return await passwd(transport, argv, shell)

    return {
        "dashboard": dashboard,
        "revoke": deny,
        "passwd": change_passphrase,
        "submit_job": submit,
        "upload_folder": upload,
        "start": begin,
        "validate": measure,
        "download_model": download,
        "wait": partial(follow, transport),
        **dict.fromkeys(FILE_ACTIONS, files),
    }
