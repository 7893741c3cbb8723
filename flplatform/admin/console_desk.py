"""What a signed-in user may ask for: commands, their descriptions, prompt and completion."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from flplatform.admin import surroundings
from flplatform.admin.modules.submission import HIDDEN
from flplatform.admin.orders import OrderBook, take_in_hand
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.core.errors import FLError, UnavailableError
from flplatform.hci import AdminServer, AdminSession, Item, Sessions
from flplatform.rpc.interceptors import Caller

EXECUTE = "/flplatform.v1.AdminConsole/Execute"

NoteRefusal = Callable[[str, str, str, FLError], None]
"""(method, name, peer, error): puts a refused call into the audit."""


class ConsoleDesk:
    """Serves signed-in users. Lives on the event loop.

    Args:
        console: carries out commands.
        sessions: who is signed in.
        orders: opens signed commands.
        rights: who may see names.
        control: what prompt and completion speak of.
        note_refusal: audits a command whose signature is refused.
    """

    def __init__(
        self,
        *,
        console: AdminServer,
        sessions: Sessions,
        orders: OrderBook,
        rights: Rights,
        control: Control,
        note_refusal: NoteRefusal,
    ) -> None:
        self._console = console
        self._sessions = sessions
        self._orders = orders
        self._rights = rights
        self._control = control
        self._note_refusal = note_refusal

    def session_of(self, caller: Caller) -> AdminSession:
        """Return the session of a caller's token, which this call counts as used.

        Raises:
            UnauthenticatedError: there is none, or it has ended.
        """
        return self._sessions.get(caller.token, caller.identity.fingerprint)

    def logout(self, caller: Caller) -> None:
        """End the caller's session."""
        self._sessions.close(self.session_of(caller).id)

    def specs(self, caller: Caller) -> list[dict[str, Any]]:
        """Describe all commands that users type, and which the caller can ever carry out."""
        return [
            view.to_dict()
            | {"allowed": self._rights.ever(caller.identity, view.permission, view.name)}
            for view in self._console.register.views()
            if view.name not in HIDDEN
        ]

    async def execute(
        self, caller: Caller, signed: bytes, attachment: bytes, *, confirmed: bool
    ) -> AsyncGenerator[Item, None]:
        """Carry out exactly the words that were signed, and yield the reply's items.

        Raises:
            FLError: the session or the signed command is refused.
        """
        session = self.session_of(caller)
        try:
            command = self._orders.open(signed, attachment, caller.identity.fingerprint)
        except FLError as error:
            self._note_refusal(EXECUTE, session.user, session.peer, error)
            raise
        command.reply_timeout_s = session.reply_timeout_s
        take_in_hand(command)
        reply = self._console.execute(
            session,
            command.order.argv,
            command,
            confirmed=confirmed,
            reference=command.order.id,
        )
        async with aclosing(reply):
            async for item in reply:
                if item["type"] == "confirm" and command.meant_run:
                    # A yes must mean the run of the question, whichever is active by then.
                    yield {"type": "session", "key": "run", "value": command.meant_run}
                yield item

    def complete(self, caller: Caller, kind: str, prefix: str) -> list[str]:
        """Return values for an argument of a kind that begin with a prefix."""
        if kind == "operation":
            mine = self._console.operations.listed(self.session_of(caller).user)
            return [each.id for each in mine if each.id.startswith(prefix)]
        if not self._rights.may_view(caller.identity):
            return []
        return surroundings.values(self._control, kind, prefix)

    async def status(self, caller: Caller, run: int) -> tuple[str, str]:
        """Return prompt and toolbar; `run` is the session's, 0 for none."""
        if not self._rights.may_view(caller.identity):
            return f"fl:{caller.identity.project} > ", ""
        if run:
            try:
                await self._control.load(run)
            except UnavailableError:
                run = 0  # the prompt would wait for it, and hold up all
            except FLError:
                pass  # the prompt says so
        return surroundings.prompt(self._control, run or None), surroundings.toolbar(self._control)
