"""The closed table of what the console does itself, beyond what every console does.

Each action imports its module when it is first used: they need NumPy, which most commands can do
without, and a console that answers one command should do so at once.
"""

# ruff: noqa: PLC0415

from collections.abc import Mapping
from functools import partial

from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.console.wait import follow
from flplatform.hci.shell import LocalAction, Shell


def actions(transport: GrpcTransport) -> Mapping[str, LocalAction]:
    """Return the actions by the name that a command's spec gives.

    Args:
        transport: the way to the server.
    """

    async def submit(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.submit import submit_job

        return await submit_job(transport, argv, shell)

    async def download(argv: list[str], shell: Shell) -> int:
        from flplatform.admin.console.download import download_model

        return await download_model(transport, argv, shell)

    return {"submit_job": submit, "download_model": download, "wait": partial(follow, transport)}
