"""Calls between sites and server: delay, loss, duplicates, cuts, half-open connections.

Each call is an exchange: a request that arrives or not, a handler that runs in the server's
process, a reply that arrives or not. What is lost looks to the caller like a connection that
keepalive declares dead `DETECT_S` later; a process that dies resets its connections at once, a
host that dies does not.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from grpc import aio

from flplatform.core.errors import FLError, InternalError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.rpc.channel import TOKEN_KEY
from flplatform.rpc.errors import error_metadata, from_rpc, status_of
from tests.simulation.world import PROCESS, Killed, Process, World

DETECT_S = 15.0
TRANSFER_S = 60.0
CHUNKS = 3

Handler = Callable[[str, str, str, Any], Awaitable[Any]]
"""(site, token, method, request) → reply."""


@dataclass(slots=True)
class Link:
    """The way between one site and the server; times until which something is so."""

    cut_up: float = 0.0
    cut_down: float = 0.0
    lossy: float = 0.0
    doubling: float = 0.0
    slow: float = 0.0
    refused: float = 0.0


@dataclass(slots=True, eq=False)
class Exchange:
    """One call."""

    site: str
    method: str
    request: Any
    token: str
    reply: "asyncio.Future[Any]"
    handler: "asyncio.Task[Any] | None" = None
    over: bool = False
    done_at_server: bool = False
    chunks: list[Any] = field(default_factory=list)


class Network:
    """All links, and the calls under way."""

    def __init__(self, world: World, sites: list[str]) -> None:
        self.world = world
        self.links = {site: Link() for site in sites}
        self.server: Process | None = None
        self.serve: Handler | None = None
        self.exchanges: dict[int, Exchange] = {}
        self._count = 0
        self._outside = contextvars.Context()

    def later(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        """Have something happen outside of every process."""
        self.world.loop.call_later(delay, act, *args, context=self._outside)

    # ---- what a message meets ----

    def delay(self, site: str) -> float:
        """Draw how long a message takes."""
        rng, link = self.world.rng, self.links[site]
        slow = link.slow > self.world.loop.now
        return rng.expovariate(1 / 2.0) if slow else 0.002 + rng.random() * 0.02

    def lost(self, site: str, up: bool) -> bool:
        """Draw whether a message never arrives."""
        link, now = self.links[site], self.world.loop.now
        if (link.cut_up if up else link.cut_down) > now:
            self.world.count("message cut off")
            return True
        if link.lossy > now and self.world.rng.random() < 0.3:
            self.world.count("message lost")
            return True
        return False

    # ---- a call's life ----

    def begin(self, site: str, method: str, request: Any, token: str) -> Exchange:
        """Send a request."""
        loop = self.world.loop
        exchange = Exchange(site, method, request, token, loop.create_future())
        self._count += 1
        number = self._count
        self.exchanges[number] = exchange
        exchange.reply.add_done_callback(lambda _: None)
        delay = self.delay(site)
        if self.lost(site, up=True):
            self.later(DETECT_S, self._fail, exchange, "keepalive timeout")
        else:
            self.later(delay, self._arrive, exchange, number)
            doubling = self.links[site].doubling > loop.now and method not in ("Upload", "Download")
            if doubling and self.world.rng.random() < 0.5:
                self.world.count("request doubled")
                self.later(delay + self.delay(site) * 5, self._again, exchange)
        return exchange

    def _arrive(self, exchange: Exchange, number: int) -> None:
        server = self.server
        if server is None or server.dead or self.links[exchange.site].refused > self.world.loop.now:
            self.exchanges.pop(number, None)
            self.later(self.delay(exchange.site), self._fail, exchange, "connection refused")
            return
        if exchange.over:
            self.exchanges.pop(number, None)
            return
        if server.frozen:  # its loop gets to this after the timers that are due by then
            server.waiting.append(partial(self._arrive, exchange, number))
            return

        async def handle() -> None:
            outcome = await self._handled(exchange)
            self.exchanges.pop(number, None)
            exchange.done_at_server = True
            if outcome is not None:
                self._send_reply(exchange, outcome)

        exchange.handler = server.spawn(handle())

    def _again(self, exchange: Exchange) -> None:
        if self.server is not None and not self.server.dead:
            self.server.spawn(self._handled(exchange))

    async def _handled(self, exchange: Exchange) -> tuple[Any, Exception | None] | None:
        assert self.serve is not None
        try:
            return (
                await self.serve(exchange.site, exchange.token, exchange.method, exchange.request),
                None,
            )
        except asyncio.CancelledError:
            return None
        except FLError as error:
            return None, error
        except Killed:
            return None
        except Exception as error:  # noqa: BLE001 - as the guard does
            self.world.note("server", f"{exchange.method} failed: {error!r}")
            return None, InternalError(f"internal error: {error!r}")

    def _send_reply(self, exchange: Exchange, outcome: tuple[Any, Exception | None]) -> None:
        if self.lost(exchange.site, up=False):
            self.later(DETECT_S, self._fail, exchange, "keepalive timeout")
        else:
            self.later(self.delay(exchange.site), self._deliver, exchange, outcome)

    def _deliver(self, exchange: Exchange, outcome: tuple[Any, Exception | None]) -> None:
        reply, error = outcome
        if exchange.reply.done():
            return
        if error is None:
            exchange.reply.set_result(reply)
        else:
            assert isinstance(error, FLError)
            exchange.reply.set_exception(
                _rpc_error(status_of(error), str(error), error_metadata(error))
            )

    def _fail(self, exchange: Exchange, why: str) -> None:
        if not exchange.reply.done():
            exchange.reply.set_exception(_rpc_error(grpc.StatusCode.UNAVAILABLE, why))
            exchange.reply.exception()

    def abandon(self, exchange: Exchange) -> None:
        """Let the server know that nobody waits any more, if it can be told."""
        exchange.over = True
        late = DETECT_S if self.lost(exchange.site, up=True) else self.delay(exchange.site)
        self.later(late, self._cancel, exchange)

    @staticmethod
    def _cancel(exchange: Exchange) -> None:
        if exchange.handler is not None and not exchange.done_at_server:
            exchange.handler.cancel()

    # ---- ends of processes ----

    def site_died(self, site: str, host: bool) -> None:
        """Reset a site's connections; those of a dead host stay half open for a while."""
        for exchange in list(self.exchanges.values()):
            if exchange.site == site:
                exchange.over = True
                if host:
                    self.world.count("half-open connection")
                self.later(DETECT_S if host else 0.01, self._cancel, exchange)

    def server_died(self, host: bool) -> None:
        """Reset all connections, or leave them half open."""
        for exchange in self.exchanges.values():
            self.later(DETECT_S if host else 0.01, self._fail, exchange, "connection reset")
        self.exchanges.clear()

    def break_connections(self, site: str) -> None:
        """Cut all connections of a site at once, as a GOAWAY or a NAT may."""
        for exchange in list(self.exchanges.values()):
            if exchange.site == site:
                self.later(0.001, self._fail, exchange, "connection reset")
                exchange.over = True
                self.later(0.01, self._cancel, exchange)


class Channel:
    """What `Session` takes for a gRPC channel."""

    def __init__(self, network: Network, site: str) -> None:
        self._network = network
        self._site = site
        self._waiting: list[asyncio.Future[Any]] = []
        self._stubs: dict[Any, Any] = {}
        self._closed = False

    def stub(self, kind: Callable[[Any], Any]) -> Any:
        """Return a stub of this channel, made once: there is no state in it."""
        if kind not in self._stubs:
            self._stubs[kind] = kind(self)
        return self._stubs[kind]

    def unary_unary(self, method: str, *_: Any, **__: Any) -> Any:
        """Return a method of a stub."""

        name = method.rpartition("/")[2]

        def call(request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
            return self.exchange(name, request, dict(metadata).get(TOKEN_KEY, ""), timeout)

        return call

    stream_stream = unary_stream = stream_unary = unary_unary

    async def exchange(self, method: str, request: Any, token: str, timeout: float | None) -> Any:
        """Make one call.

        Raises:
            aio.AioRpcError: it failed or was refused.
        """
        if self._closed:
            raise aio.UsageError("Channel is closed.")
        exchange = self._network.begin(self._site, method, request, token)
        reply = exchange.reply
        self._waiting.append(reply)
        timer = reply.get_loop().call_later(timeout or TRANSFER_S, _late, reply)
        try:
            return await reply
        except (_Late, asyncio.CancelledError) as error:
            self._network.abandon(exchange)
            if isinstance(error, _Late):
                raise _rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded") from None
            raise
        finally:
            timer.cancel()
            self._waiting.remove(reply)

    async def close(self) -> None:
        """Close; what is under way looks cancelled."""
        self._closed = True
        for future in self._waiting:
            future.cancel()


class _Late(Exception):  # noqa: N818 - what happened
    """Nothing came in time."""


def _late(reply: "asyncio.Future[Any]") -> None:
    if not reply.done():
        reply.set_exception(_Late())


def _rpc_error(status: grpc.StatusCode, details: str, trailing: Any = ()) -> aio.AioRpcError:
    nothing: Any = ()
    return aio.AioRpcError(status, nothing, trailing, details)


def connect(network: Network) -> Channel:
    """Return a channel of the site whose process runs."""
    process = PROCESS.get()
    assert process is not None
    return Channel(network, process.name)


async def send_blob(
    channel: Channel, path: Any, blob: ModelRef, transfer_id: str, *, token: str, **_: Any
) -> None:
    """Upload a file; see `rpc.transfers.send_blob`."""
    request = (transfer_id, blob, path.read_bytes())
    try:
        committed = await channel.exchange("Upload", request, token, TRANSFER_S)
    except aio.AioRpcError as error:
        raise from_rpc(error) from None
    if not committed:
        raise UnavailableError("the upload was cut before its end")


async def fetch_blob(channel: Channel, blob: ModelRef, blobs: Any, *, token: str, **_: Any) -> Any:
    """Download a blob, going on where an earlier try was cut; see `rpc.transfers.fetch_blob`."""
    if blobs.has(blob.digest):
        return blobs.path(blob.digest)
    writer = await asyncio.to_thread(blobs.receive, f"download {blob.digest}", blob, None)
    try:
        received = writer.offset
        request = (blob.digest, received)
        data = await channel.exchange("Download", request, token, TRANSFER_S)
        await asyncio.to_thread(writer.write, data)
        if received + len(data) != blob.size:
            raise UnavailableError(f"the download stopped at byte {received + len(data)}")
        await asyncio.to_thread(writer.commit)
    except BaseException as error:
        writer.suspend()
        if isinstance(error, aio.AioRpcError):
            raise from_rpc(error) from None
        raise
    return blobs.path(blob.digest)
