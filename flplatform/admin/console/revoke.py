"""`revoke`: the console signs what its user has said yes to; the server only carries it."""

from datetime import UTC, datetime, timedelta
from typing import get_args

from pydantic import ValidationError

from flplatform.admin.console.exchange import Refused, ask, data_of
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.modules.revocation import DENY, REVOCATION
from flplatform.core.errors import InvalidArgumentError
from flplatform.hci.connection import ExitCode
from flplatform.hci.shell import Shell
from flplatform.security.denials import DeniedKind
from flplatform.security.signing import DenialOrder

ORDER_S = 300.0
"""How long the server may take a denial in after it was signed."""


async def revoke(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Revoke a name, or undo that, and return the exit code.

    Raises:
        FLError: it is refused, and why.
    """
    values = shell.parse(argv)
    name, undo = values["name"], values["undo"]
    words = [REVOCATION, name, *(["--kind", values["kind"]] if values["kind"] else [])]
    try:
        found = data_of(await ask(transport, shell, words), "revocation")
        kind = values["kind"] or found["kind"]
        if kind not in get_args(DeniedKind):
            raise InvalidArgumentError(f"the server says {kind!r}", field="kind")
        # The kind is in the question: what is signed is what the user has said yes to.
        who = f"the {kind} {name}" + (
            f" of {found['organisation']}" if found["organisation"] else ""
        )
        question = f"revoke {who}: {found['ends']}. Continue?"
        if undo:
            by = f" (revoked by {found['revoked_by']})" if found["revoked_by"] else ""
            question = f"let {who} take part again{by}. Continue?"
        if not await shell.confirm(question):
            shell.show({"type": "text", "text": "nothing was done"})
            return ExitCode.INTERRUPTED
        now = datetime.now(UTC)
        try:
            order = DenialOrder(
                project=transport.credentials.kit.admin.project,
                issued_at=now,
                not_after=now + timedelta(seconds=ORDER_S),
                name=name,
                kind=kind,
                reason=values["reason"],
                undo=undo,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidArgumentError(first["msg"], field=str(first["loc"][0])) from None
        items = await ask(transport, shell, [DENY, name], transport.credentials.sign(order))
    except Refused as refused:
        return refused.exit_code
    for item in items:
        shell.show(item)
    failed = any(item["type"] == "row" and item["status"] != "ok" for item in items)
    return ExitCode.FAILED if failed else ExitCode.OK
