"""`wait`: follows a run to its end, through restarts of the server."""

from collections.abc import Callable
from contextlib import aclosing

from flplatform.admin.console.exchange import persist
from flplatform.admin.console.transport import GrpcTransport
from flplatform.core.errors import UnavailableError
from flplatform.hci.connection import Item
from flplatform.hci.shell import Shell


async def follow(
    transport: GrpcTransport,
    argv: list[str],
    shell: Shell,
    show: Callable[[Item], None] | None = None,
) -> int:
    """Follow a run and return the exit code: 0 if it finished, 5 if it failed or was aborted.

    A server that comes back tells the whole story again: lines told before are left out.

    Args:
        transport: the way to the server.
        argv: `wait`, and the run's number or nothing.
        shell: shows what happens.
        show: shows it instead.

    Raises:
        UnavailableError: the server stays away.
        FLError: the server refuses the call as such.
    """
    told: set[str] = set()
    show = show or shell.show

    async def listen() -> int:
        async with aclosing(transport.execute(argv, False)) as reply:
            async for item in reply:
                match item:
                    case {"type": "done", "exit_code": int(code)}:
                        return code
                    case {"type": "error", "code": UnavailableError.code, "message": str(message)}:
                        raise UnavailableError(message)  # the server stops; it may come back
                    case {"type": "text", "text": str(line)}:
                        if line not in told:
                            told.add(line)
                            show(item)
                    case _:
                        show(item)
        raise UnavailableError("the reply ended before it was complete")

    return await persist(shell, listen)
