"""The site's connection: register, call, and come back after every break."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from grpc import aio

from flplatform import __version__
from flplatform.client.retrying import backoff_s, level_of, persist
from flplatform.core.errors import (
    DeadlineExceededError,
    FLError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.rpc.channel import TOKEN_KEY, open_channel
from flplatform.rpc.errors import REPLACED_TOKEN, from_rpc, has_error
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.kit import Kit

log = logging.getLogger(__name__)

PROTOCOL = 1
WAITING_CALL_S = 90.0
"""Deadline of a waiting call: the server answers after 60 s at the latest."""
MIN_HEARTBEAT_S = 0.05
AT_LEAST_S = 1.0
"""So much of a pause is kept also if the server answers again meanwhile."""

T = TypeVar("T")


class Session:
    """One registration at a time, shared by everything that talks to the server.

    Args:
        kit: the site's verified kit.
        isolation: the best isolation level of this host.
        runs: returns the runs in hand, told to the server at registration.
    """

    def __init__(self, kit: Kit, isolation: str, runs: Callable[[], list[int]]) -> None:
        self._kit = kit
        self._isolation = isolation
        self._runs = runs
        self._lock = asyncio.Lock()
        self._address = 0
        self._channels: tuple[aio.Channel, aio.Channel] | None = None
        self._answers = asyncio.Event()
        self._answers.set()
        self._registered_at = 0.0
        self._contests = 0
        self.token = ""
        self.heartbeat_s = kit.site.heartbeat_s
        self.connected = asyncio.Event()
        self.registrations = 0

    @property
    def transfers(self) -> aio.Channel:
        """The channel for blobs: a connection of its own, so that control never waits.

        Raises:
            UnavailableError: not connected.
        """
        if self._channels is None:
            raise UnavailableError("not connected to the server")
        return self._channels[1]

    async def register(self, dead_token: str, *, replaced: bool = False) -> None:
        """Register unless somebody else has since `dead_token` was in use; tries for ever.

        Args:
            dead_token: what is not valid any more.
            replaced: whether the server says that this site has registered again, elsewhere.
        """
        async with self._lock:
            attempt = 0
            if replaced and self.token == dead_token:
                await self._yield_contest()
            while self.token == dead_token:
                self.connected.clear()
                try:
                    await self._register_once()
                except FLError as error:
                    pause = backoff_s(attempt, self._kit.site.backoff_max_s)
                    attempt += 1
                    tries = f"try {attempt} failed, next in {pause:.1f} s"
                    level = logging.WARNING if attempt == 1 else level_of(attempt)
                    where = self._server_address()
                    log.log(level, "cannot register with %s: %s: %s", where, tries, error)
                    self._address += 1
                    await self._close_channels()
                    await asyncio.sleep(pause)

    async def _yield_contest(self) -> None:
        """Pause ever longer while another process takes this site's registration again and again.

        The first time it may be a registration of this process that was late or doubled on its way.
        """
        longest_s = self._kit.site.backoff_max_s
        lived_s = asyncio.get_running_loop().time() - self._registered_at
        self._contests = self._contests + 1 if lived_s < 2 * longest_s else 1
        if self._contests == 1:
            return
        pause = backoff_s(self._contests, longest_s)
        text = "somebody else has registered as this site: is its kit in use elsewhere? Next in"
        log.log(level_of(self._contests), "%s %.1f s", text, pause)
        self.connected.clear()
        await asyncio.sleep(pause)

    async def _register_once(self) -> None:
        control, _ = self._open()
        request = pb.RegisterRequest(
            protocol=PROTOCOL, version=__version__, isolation=self._isolation, runs=self._runs()
        )
        try:
            reply = await pb_grpc.FederatedTrainingStub(control).Register(
                request, timeout=self._kit.site.request_timeout_s
            )
        except aio.AioRpcError as error:
            raise from_rpc(error) from None
        self.token = reply.token
        self.heartbeat_s = min(self._kit.site.heartbeat_s, max(MIN_HEARTBEAT_S, reply.heartbeat_s))
        self.connected.set()
        self._answers.set()
        self._registered_at = asyncio.get_running_loop().time()
        self.registrations += 1
        log.info("registered with %s", self._server_address())

    def _server_address(self) -> str:
        servers = self._kit.site.servers
        return servers[self._address % len(servers)]

    def _open(self) -> tuple[aio.Channel, aio.Channel]:
        if self._channels is None:
            proxy = self._kit.site.proxy
            extra = [("grpc.http_proxy", f"http://{proxy}")] if proxy else []
            extra_options: list[tuple[str, int | str]] = [
                *extra,
                ("grpc.enable_http_proxy", 1 if proxy else 0),
            ]

            def channel() -> aio.Channel:
                return open_channel(
                    self._server_address(),
                    key_pem=self._kit.key_pem(),
                    chain_pem=self._kit.chain,
                    trusted_pem=self._kit.trust.tls_roots("server"),
                    extra=extra_options,
                )

            self._channels = (channel(), channel())
        return self._channels

    async def _close_channels(self) -> None:
        channels, self._channels = self._channels, None
        for channel in channels or ():
            await channel.close()

    async def call(
        self, service: Callable[[aio.Channel], Any], method: str, request: Any, timeout_s: float
    ) -> Any:
        """Make one call, registering first or again where needed.

        Raises:
            UnavailableError: the connection broke; try again.
            FLError: the server refused.
        """
        if not self.token:
            await self.register("")
        for last in (False, True):
            token = self.token
            control, _ = self._open()
            broken = False
            try:
                reply = await getattr(service(control), method)(
                    request, timeout=timeout_s, metadata=((TOKEN_KEY, token),)
                )
                self._answers.set()
                return reply
            except aio.AioRpcError as error:
                failure = from_rpc(error)
                broken = isinstance(failure, UnavailableError) and not has_error(error)
                if broken:
                    self._answers.clear()
            except (asyncio.CancelledError, aio.BaseError) as error:
                failure = _closed(error)
            if isinstance(failure, DeadlineExceededError):
                failure = UnavailableError(f"{method}: no answer within {timeout_s:g} s")
            if broken and len(self._kit.site.servers) > 1:
                await self.register(token)  # the server may have moved to its next address
            if not isinstance(failure, UnauthenticatedError):
                raise failure
            if last:  # another registration, late or doubled on its way, has overtaken this one
                raise UnavailableError(failure.message)
            await self.register(token, replaced=failure.rule == REPLACED_TOKEN)
        raise AssertionError("unreachable")

    async def training(self, method: str, request: Any, timeout_s: float = 0) -> Any:
        """Call a method of `FederatedTraining`; see `call`."""
        return await self.call(
            pb_grpc.FederatedTrainingStub,
            method,
            request,
            timeout_s or self._kit.site.request_timeout_s,
        )

    async def admin(self, method: str, request: Any, timeout_s: float = 0) -> Any:
        """Call a method of `AdminCommunicating`; see `call`."""
        return await self.call(
            pb_grpc.AdminCommunicatingStub,
            method,
            request,
            timeout_s or self._kit.site.request_timeout_s,
        )

    async def transfer(self, move: Callable[[aio.Channel, str], Awaitable[T]]) -> T:
        """Move a blob, registering first or again where needed.

        Raises:
            UnavailableError: the connection broke; try again.
            FLError: the server refused.
        """
        if not self.token:
            await self.register("")
        token = self.token
        try:
            return await self._move(move, token)
        except UnauthenticatedError as error:
            await self.register(token, replaced=error.rule == REPLACED_TOKEN)
        try:
            return await self._move(move, self.token)
        except UnauthenticatedError as error:  # see `call`
            raise UnavailableError(error.message) from None

    async def _move(self, move: Callable[[aio.Channel, str], Awaitable[T]], token: str) -> T:
        try:
            return await move(self._open()[1], token)
        except DeadlineExceededError as error:
            raise UnavailableError(error.message) from None
        except (asyncio.CancelledError, aio.BaseError) as error:
            raise _closed(error) from None

    async def persist(self, what: str, step: Callable[[], Awaitable[T]]) -> T:
        """Do `step` until it is answered; see `retrying.persist`."""
        return await persist(what, step, self._kit.site.backoff_max_s, self._pause)

    async def _pause(self, seconds: float) -> None:
        """Pause; if the connection is broken, until the server answers again at the longest."""
        if self._answers.is_set():
            await asyncio.sleep(seconds)
            return
        await asyncio.sleep(min(AT_LEAST_S, seconds))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - AT_LEAST_S):
                await self._answers.wait()

    async def repeat(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Do `step` for ever; a refusal or a defect is logged, then a pause and the next try."""
        attempt = 0
        while True:
            pause = backoff_s(attempt, self._kit.site.backoff_max_s)
            try:
                await self.persist(what, step)
                attempt = 0
                continue
            except FLError as error:
                log.warning("%s: refused, next try in %.1f s: %s", what, pause, error)
            except Exception:
                log.exception("%s: a defect of this program, next try in %.1f s", what, pause)
            attempt += 1
            await self._pause(pause)

    async def close(self, reason: str) -> None:
        """Say goodbye if that is possible, and close the connection."""
        if self.connected.is_set():
            try:
                await pb_grpc.FederatedTrainingStub(self._open()[0]).Quit(
                    pb.QuitRequest(reason=reason), timeout=2.0, metadata=((TOKEN_KEY, self.token),)
                )
            except aio.AioRpcError as error:
                log.debug("quit: %s", error.details())
        await self._close_channels()


def _closed(error: BaseException) -> UnavailableError:
    """Return what a call comes to whose channel was closed under it, which looks like a cancel.

    Raises:
        asyncio.CancelledError: the caller itself is cancelled.
    """
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
    return UnavailableError(f"the connection was closed: {error}".rstrip(": "))
