"""The admin port: decode → one call → encode. Who calls is known from the certificate."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from flplatform import __version__
from flplatform.admin.console_desk import ConsoleDesk
from flplatform.admin.login import LoginDesk
from flplatform.rpc.interceptors import Rule, caller
from flplatform.rpc.streams import DOWNLOAD, UPLOAD
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.identity import Identity

ADMIN_RULES = {
    "/flplatform.v1.AdminConsole/Challenge": Rule(token=False),
    "/flplatform.v1.AdminConsole/Login": Rule(token=False),
    "/flplatform.v1.AdminConsole/Logout": Rule(),
    "/flplatform.v1.AdminConsole/Specs": Rule(),
    "/flplatform.v1.AdminConsole/Execute": Rule(),
    "/flplatform.v1.AdminConsole/Complete": Rule(),
    "/flplatform.v1.AdminConsole/Status": Rule(),
    UPLOAD: Rule(),
    DOWNLOAD: Rule(),
}
"""What each method of the admin port demands; one that is missing is refused."""


class AdminConsoleServicer(pb_grpc.AdminConsoleServicer):
    """Sign-in, commands, and what the console shows around them.

    Args:
        server: the server's own identity.
        login: lets users in.
        desk: carries out what they ask.
    """

    def __init__(self, server: Identity, login: LoginDesk, desk: ConsoleDesk) -> None:
        self._server = server
        self._login = login
        self._desk = desk

    async def Challenge(self, _request: pb.Empty, _context: Any) -> pb.ChallengeReply:
        """Hand out a nonce for one login."""
        nonce = self._login.challenges.make(caller().identity.fingerprint)
        return pb.ChallengeReply(nonce=nonce)

    async def Login(self, request: pb.LoginRequest, _context: Any) -> pb.LoginReply:
        """Open a session."""
        token, session = await self._login.login(
            caller(), request.nonce, request.password, request.user_file, request.user_signature
        )
        left = self._server.not_after - datetime.now(UTC)
        return pb.LoginReply(
            token=token,
            user=session.user,
            role=session.role,
            organisation=session.organisation,
            project=self._server.project,
            server=self._server.name,
            version=__version__,
            server_days_left=left.total_seconds() / 86_400,
        )

    async def Logout(self, _request: pb.Empty, _context: Any) -> pb.Empty:
        """End the calling session."""
        self._desk.logout(caller())
        return pb.Empty()

    async def Specs(self, _request: pb.Empty, _context: Any) -> pb.SpecsReply:
        """Describe the commands."""
        return pb.SpecsReply(specs=json.dumps(self._desk.specs(caller())).encode())

    async def Execute(
        self, request: pb.ExecuteRequest, _context: Any
    ) -> AsyncIterator[pb.ReplyItem]:
        """Carry out a signed command and stream the reply."""
        reply = self._desk.execute(
            caller(), request.signed, request.attachment, confirmed=request.confirmed
        )
        async with aclosing(reply):
            async for item in reply:
                yield pb.ReplyItem(item=json.dumps(item).encode())

    async def Complete(self, request: pb.CompleteRequest, _context: Any) -> pb.CompleteReply:
        """Offer values for an argument."""
        return pb.CompleteReply(values=self._desk.complete(caller(), request.kind, request.prefix))

    async def Status(self, request: pb.StatusRequest, _context: Any) -> pb.StatusReply:
        """Say what prompt and toolbar show."""
        prompt, toolbar = await self._desk.status(caller(), request.run)
        return pb.StatusReply(prompt=prompt, toolbar=toolbar)
