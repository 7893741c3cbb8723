"""How local actions talk to the server: hidden commands, and patience with a broken connection."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from flplatform.admin.console.transport import GrpcTransport
from flplatform.core.errors import UnauthenticatedError, UnavailableError
from flplatform.hci.connection import Item
from flplatform.hci.shell import Shell

PROVE = "prove"
"""The hidden verb that carries a password."""

TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between two tries; each pause is twice the one before."""

T = TypeVar("T")


class Refused(Exception):  # noqa: N818 - not an error: it has been shown, the code remains
    """The server refused a hidden command and the user has been told why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


async def ask(
    transport: GrpcTransport, shell: Shell, argv: list[str], attachment: bytes = b""
) -> list[Item]:
    """Have the server carry out a command of the console's own; return its rows and data.

    If the server wants the password once more, it gets it, and the command is repeated.

    Raises:
        Refused: it was refused; the errors have been shown.
        UnavailableError: the connection broke.
        FLError: the server refused the call as such.
    """
    items = await _ask(transport, shell, argv, attachment)
    if items is None:
        await prove(transport, shell)
        items = await _ask(transport, shell, argv, attachment)
    if items is None:
        raise UnauthenticatedError("the server wants the password, and had it just now")
    return items


async def prove(transport: GrpcTransport, shell: Shell) -> None:
    """Prove once more who is at the console: by the passphrase, or by the password file's.

    Raises:
        UnauthenticatedError: the passphrase is wrong, or the server does not believe it.
    """
    credentials = transport.credentials
    if shell.asker is not None and not transport.unattended:
        question = f"passphrase of {credentials.kit.identity.name}, once more: "
        passphrase = await shell.ask(question, hidden=True)
        credentials = type(credentials).open(credentials.kit, passphrase)
    text = json.dumps({"password": credentials.password})
    try:
        await _ask(transport, shell, [PROVE], text.encode())
    except Refused as refused:
        raise UnauthenticatedError("nothing was done: the password is not believed") from refused


async def _ask(
    transport: GrpcTransport, shell: Shell, argv: list[str], attachment: bytes
) -> list[Item] | None:
    """Return the items; None if the server wants the password first."""
    items: list[Item] = []
    async with aclosing(transport.execute(argv, True, attachment)) as reply:
        async for item in reply:
            match item:
                case {"type": "done", "exit_code": int(code)}:
                    if any(each["type"] == "error" for each in items):
                        raise Refused(code)
                    return items
                case {"type": "reauthenticate"}:
                    return None
                case {"type": "session", "key": str(key), "value": value}:
                    shell.remembered[key] = value
                case {"type": "error"}:
                    shell.show(item)
                    items.append(item)
                case _:
                    items.append(item)
    raise UnavailableError("the reply ended before it was complete")


def data_of(items: list[Item], name: str) -> Any:
    """Return the value of a data item, None if there is none."""
    return next(
        (item["value"] for item in items if item["type"] == "data" and item["name"] == name), None
    )


async def persist(shell: Shell, step: Callable[[], Awaitable[T]]) -> T:
    """Do an idempotent step, again and again while the connection is broken.

    Raises:
        UnavailableError: it stays broken.
        FLError: the server refuses.
    """
    clock = asyncio.get_running_loop().time
    attempt = 0
    while attempt < TRIES:
        began = clock()
        try:
            return await step()
        except UnavailableError as error:
            if clock() - began > LONGEST_PAUSE_S:
                attempt = 0  # the connection was there: it has broken anew
            pause_s = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            shell.show(
                {"type": "text", "text": f"{error.message}; trying again in {pause_s:.1f} s"}
            )
            await asyncio.sleep(pause_s)
            attempt += 1
    return await step()
