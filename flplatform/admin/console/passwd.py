"""`passwd`: another passphrase for the kit's key, and with it another password at the server.

The passphrase opens the key, and the password is derived from it, so both change together:

1. the server lets the new password hold beside the old one;
2. the key is encrypted with the new passphrase, in one rename;
3. a sign-in with the new password ends the old one.

Wherever that breaks off, the passphrase that opens the key also proves its user.
"""

import asyncio
import json

from flplatform.admin.console.exchange import PROVE, Refused, ask
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.core.errors import FLError, InvalidArgumentError
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell
from flplatform.security.authn import MAX_PASSWORD_BYTES

CHANGE = "change_password"
MIN_CHARACTERS = 10

EXPLAINED = (
    "The passphrase opens the key in this kit and proves you to the server: both are changed.\n"
    "Copies of this kit elsewhere keep the old passphrase, which then opens their key but signs "
    "nobody in."
)


async def passwd(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Change passphrase and password and return the exit code.

    Raises:
        InvalidArgumentError: nobody can be asked, or the new passphrase is not one.
        UnauthenticatedError: the old one is wrong.
        OSError: the key cannot be written; the old passphrase goes on to hold.
        FLError: the server refuses; nothing has changed then.
    """
    shell.parse(argv)
    kit = transport.credentials.kit
    shell.show({"type": "text", "text": EXPLAINED})
    old = await shell.ask(f"passphrase of {kit.identity.name} now: ", hidden=True)
    before = await asyncio.to_thread(Credentials.open, kit, old)
    new = await shell.ask("new passphrase: ", hidden=True)
    _check(old, new)
    if await shell.ask("new passphrase, once more: ", hidden=True) != new:
        raise InvalidArgumentError("the two are not alike; nothing was changed")
    after = await asyncio.to_thread(before.renewed, new)
    body = {"password": before.password, "new": after.password}
    try:
        await ask(transport, shell, [CHANGE], json.dumps(body).encode())
    except Refused as refused:
        return refused.exit_code
    await asyncio.to_thread(kit.change_passphrase, old, new)
    transport.credentials = after
    try:
        await ask(transport, shell, [PROVE], json.dumps({"password": after.password}).encode())
    except (FLError, Refused):
        text = "passphrase changed; the old password ends with your next sign-in"
    else:
        text = "passphrase and password changed; your other sessions have ended"
    if transport.unattended:
        text += "; the password file still holds the old passphrase"
    shell.show({"type": "text", "text": text})
    return ExitCode.OK


def _check(old: str, new: str) -> None:
    if len(new) < MIN_CHARACTERS:
        raise InvalidArgumentError(f"a passphrase has at least {MIN_CHARACTERS} characters")
    if len(new.encode()) > MAX_PASSWORD_BYTES or not new.isprintable() or new != new.strip():
        raise InvalidArgumentError(
            f"a passphrase is printable, without spaces at its ends, at most {MAX_PASSWORD_BYTES} "
            "bytes"
        )
    if new == old:
        raise InvalidArgumentError("the new passphrase is the old one")
