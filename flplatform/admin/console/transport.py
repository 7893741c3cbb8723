"""The console's way to the server: signs every command, and signs in again when it must."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc import aio

from flplatform.core.errors import (
    FLError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.hci.connection import Item
from flplatform.hci.view import SpecView
from flplatform.rpc.channel import TOKEN_KEY, open_channel
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.authn import password_of
from flplatform.security.kit import Kit
from flplatform.security.signing import CommandOrder, Order, sign_order

log = logging.getLogger(__name__)

ORDER_S = 60.0
"""How long a signed command is valid, besides the time a call may take."""

STATUS_S = 2.0
"""Pause between two looks at what prompt and toolbar show."""

IDLE_S = 600.0
"""After so long without a command the prompt is no longer kept fresh: the session may end."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Credentials:
    """An opened kit: whoever holds this is the user.

    Attributes:
        kit: the admin's verified kit.
        key: the private key.
        password: what proves the user to the server.
    """

    kit: Kit
    key: ec.EllipticCurvePrivateKey
    password: str

    @classmethod
    def open(cls, kit: Kit, passphrase: str) -> "Credentials":
        """Open a kit.

        Raises:
            UnauthenticatedError: the passphrase is wrong.
            ConfigError: this is not an admin's kit.
        """
        admin = kit.admin
        return cls(
            kit, kit.private_key(passphrase), password_of(passphrase, admin.project, admin.name)
        )

    def renewed(self, passphrase: str) -> "Credentials":
        """Return the same user with the password of another passphrase."""
        admin = self.kit.admin
        return replace(self, password=password_of(passphrase, admin.project, admin.name))

    def sign(self, order: Order) -> bytes:
        """Sign an order."""
        return sign_order(order, self.key, self.kit.chain).to_bytes()

    def key_pem(self) -> bytes:
        """Return the key for TLS."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class GrpcTransport:
    """`hci.shell.Transport` over the admin port.

    Args:
        credentials: of the user.

    Attributes:
        current_run: returns the session's run, which is signed with every command.
        welcome: the server's answer to the last sign-in.
        address: of the server in use.
        unattended: whether the passphrase came from a file, and so nobody is asked for it again.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.current_run: Callable[[], int | None] = lambda: None
        self.welcome = pb.LoginReply()
        self.address = ""
        self.unattended = False
        self._config = credentials.kit.admin
        self._channel: aio.Channel | None = None
        self._token = ""
        self._specs: list[SpecView] = []
        self._status = pb.StatusReply()
        self._last_used = 0.0
        self._refused = False  # the last sign-in
        self._signing_in = asyncio.Lock()

    # ---- the connection ----

    async def connect(self) -> None:
        """Sign in at the first server address that answers.

        Raises:
            UnavailableError: none does.
            FLError: a server refuses.
        """
        await self._sign_in(self._token)

    async def close(self) -> None:
        """Sign out and hang up."""
        if self._channel is None:
            return
        if self._token:
            try:
                await self._stub().Logout(pb.Empty(), timeout=2.0, metadata=self._metadata())
            except aio.AioRpcError as error:
                log.debug("logout: %s", error.details())
        await self._channel.close()
        self._channel, self._token = None, ""

    async def _sign_in(self, dead_token: str) -> None:
        """Get a new token, unless another call has got one since `dead_token` was in use."""
        async with self._signing_in:
            if self._token != dead_token:
                return
            failure: FLError = UnavailableError("the kit names no server")
            for address in self._addresses():
                try:
                    await self._sign_in_at(address)
                except UnauthenticatedError as error:
                    self._refused = True
                    if self.welcome.token:  # it had been right before
                        hint = "was the passphrase changed elsewhere? leave and sign in anew"
                        raise UnauthenticatedError(error.message, hint=hint) from None
                    raise
                except UnavailableError as error:
                    failure = UnavailableError(f"{address}: {error.message}", hint=error.hint)
                else:
                    self._refused = False
                    return
            raise failure

    def _addresses(self) -> list[str]:
        """The address in use first."""
        return sorted(self._config.servers, key=lambda address: address != self.address)

    async def _sign_in_at(self, address: str) -> None:
        if self._channel is None or address != self.address:
            if self._channel is not None:
                await self._channel.close()
            self._channel = self._open(address)
            self.address = address
        timeout_s, stub = self._config.request_timeout_s, self._stub()
        record = self.credentials.kit.user_record()
        try:
            challenge = await stub.Challenge(pb.Empty(), timeout=timeout_s)
            request = pb.LoginRequest(
                nonce=challenge.nonce,
                password=self.credentials.password,
                user_file=record.payload,
                user_signature=record.to_detached(),
            )
            self.welcome = await stub.Login(request, timeout=timeout_s)
            self._token = self.welcome.token
            reply = await stub.Specs(pb.Empty(), timeout=timeout_s, metadata=self._metadata())
        except aio.AioRpcError as error:
            raise from_rpc(error) from None
        self._specs = [SpecView.from_dict(each) for each in json.loads(reply.specs)]

    def _open(self, address: str) -> aio.Channel:
        kit, proxy = self.credentials.kit, self._config.proxy
        extra: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 1 if proxy else 0)]
        if proxy:
            extra.append(("grpc.http_proxy", f"http://{proxy}"))
        return open_channel(
            address,
            key_pem=self.credentials.key_pem(),
            chain_pem=kit.chain,
            trusted_pem=kit.trust.tls_roots("server"),
            extra=extra,
        )

    def _stub(self) -> Any:
        return pb_grpc.AdminConsoleStub(self._channel)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((TOKEN_KEY, self._token),)

    async def with_session(self, step: Callable[[aio.Channel, str], Awaitable[T]]) -> T:
        """Do something with channel and token, signing in first or again where needed.

        Raises:
            UnavailableError: there is no connection.
            FLError: the server refuses.
        """
        for last in (False, True):
            token = self._token
            if not token:
                await self._sign_in(token)
                token = self._token
            assert self._channel is not None
            try:
                return await step(self._channel, token)
            except UnavailableError:
                self._token = ""  # the next try may find the server at another address
                raise
            except UnauthenticatedError:
                if last:
                    raise
                await self._sign_in(token)
        raise AssertionError("unreachable")

    # ---- hci.shell.Transport ----

    def specs(self) -> list[SpecView]:
        """Return the commands, as fetched at sign-in."""
        return self._specs

    async def execute(
        self, argv: list[str], confirmed: bool, attachment: bytes = b""
    ) -> AsyncGenerator[Item, None]:
        """Sign and send a command and yield its reply items.

        Args:
            argv: the words that the user typed.
            confirmed: whether the user has said yes to the command's question.
            attachment: a signed start order.

        Raises:
            UnavailableError: there is no connection.
            FLError: the server refuses the call as such.
        """
        self._last_used = asyncio.get_running_loop().time()
        replied = False
        for last in (False, True):
            token = self._token
            try:
                async with aclosing(self._execute(argv, confirmed, attachment)) as reply:
                    async for item in reply:
                        replied = True
                        yield item
                return
            except UnavailableError:
                self._token = ""  # as above
                raise
            except UnauthenticatedError:
                if last or replied:
                    raise
            await self._sign_in(token)

    async def _execute(
        self, argv: list[str], confirmed: bool, attachment: bytes
    ) -> AsyncGenerator[Item, None]:
        if not self._token:
            raise UnauthenticatedError("not signed in")
        now = datetime.now(UTC)
        order = CommandOrder(
            project=self._config.project,
            issued_at=now,
            not_after=now + timedelta(seconds=ORDER_S + self._config.request_timeout_s),
            id=secrets.token_hex(16),
            argv=tuple(argv),
            run=self.current_run(),
        )
        request = pb.ExecuteRequest(
            signed=self.credentials.sign(order), attachment=attachment, confirmed=confirmed
        )
        call = self._stub().Execute(request, metadata=self._metadata())
        try:
            async for reply in call:
                yield _item(reply.item)
        except aio.AioRpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()

    async def complete(self, kind: str, prefix: str) -> list[str]:
        """Return values of a kind that begin with a prefix; none if nobody answers."""
        request = pb.CompleteRequest(kind=kind, prefix=prefix)
        try:
            reply = await self._call("Complete", request)
        except FLError as error:
            log.debug("completion: %s", error)
            return []
        return list(reply.values)

    def prompt(self) -> str:
        """Return the prompt as of the last look."""
        return self._status.prompt or f"fl:{self._config.project} > "

    def toolbar(self) -> str:
        """Return the last event as of the last look."""
        return self._status.toolbar

    # ---- around it ----

    async def refresh(self) -> None:
        """Look at what prompt and toolbar show; without an answer they say so."""
        try:
            if self._refused:  # looks that try an old password would lock its user out
                raise UnauthenticatedError("sign-in refused")
            status = pb.StatusRequest(run=self.current_run() or 0)
            self._status = await self._call("Status", status)
        except FLError as error:
            state = "signed out" if isinstance(error, UnauthenticatedError) else "no connection"
            prompt = f"fl:{self._config.project}  {state} > "
            self._status = pb.StatusReply(prompt=prompt, toolbar=error.message)

    async def keep_fresh(self) -> None:
        """Refresh the prompt again and again, while somebody is at work."""
        now = asyncio.get_running_loop().time
        self._last_used = now()
        while True:
            if now() - self._last_used < IDLE_S:
                await self.refresh()
            await asyncio.sleep(STATUS_S)

    async def _call(self, method: str, request: Any) -> Any:
        async def step(_: aio.Channel, token: str) -> Any:
            try:
                return await getattr(self._stub(), method)(
                    request,
                    timeout=self._config.request_timeout_s,
                    metadata=((TOKEN_KEY, token),),
                )
            except aio.AioRpcError as error:
                raise from_rpc(error) from None

        return await self.with_session(step)


def _item(data: bytes) -> Item:
    """Decode a reply item.

    Raises:
        InvalidArgumentError: it is not one.
    """
    item = json.loads(data)
    if not isinstance(item, dict) or "type" not in item:
        raise InvalidArgumentError("the server sent something that is not a reply item")
    return item
