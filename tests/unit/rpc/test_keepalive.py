"""A connection that is lost without a word is noticed at both ends, within two keepalives.

The options are those of the product but for the seconds, which are fewer here.
"""

import asyncio
import time

import grpc
import pytest
from grpc import aio

from flplatform.rpc import channel
from tests.faults.proxy import Proxy
from tests.support.federation import Federation
from tests.unit.rpc import loopback
from tests.unit.rpc.loopback import SERVICE, metadata, serving

KEEPALIVE_S = 0.5
TIMEOUT_S = 2.0
"""Longer than a busy machine stands still: the ping of a quiet connection is answered."""
QUICK = {
    "grpc.keepalive_time_ms": int(KEEPALIVE_S * 1000),
    "grpc.keepalive_timeout_ms": int(TIMEOUT_S * 1000),
    "grpc.http2.ping_timeout_ms": int(TIMEOUT_S * 1000),
}
SPARE_S = 15.0
"""gRPC rounds its timers, and the machine may be busy; without pings nobody notices in minutes."""


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(channel._COMMON)
    assert QUICK.keys() <= options.keys()
    monkeypatch.setattr(channel, "_COMMON", [*(options | QUICK).items()])
    permitted = (
        "grpc.http2.min_ping_interval_without_data_ms",
        QUICK["grpc.keepalive_time_ms"] // 3,
    )

    def server_options(age_s: float) -> channel.Options:
        return [*(dict(channel.server_options(age_s)) | dict([permitted])).items()]

    monkeypatch.setattr(loopback, "server_options", server_options)


@pytest.mark.usefixtures("_quick")
def test_a_silent_connection_is_noticed_at_both_ends(federation: Federation) -> None:
    async def scene() -> None:
        inside, gone = asyncio.Event(), asyncio.Event()

        async def wait(_request: bytes, _context: object) -> bytes:
            inside.set()
            try:
                await asyncio.sleep(600)
            finally:
                gone.set()
            return b"never"

        handlers = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
        async with serving(federation, handlers) as port:
            with Proxy(port.number) as proxy:
                port.number = proxy.port
                async with port.channel(federation.open("site-1")) as opened:
                    call = opened.unary_unary(f"/{SERVICE}/Wait")(b"", metadata=metadata())
                    await inside.wait()
                    proxy.lose()
                    began = time.monotonic()
                    with pytest.raises(aio.AioRpcError) as caught:
                        await call
                    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
                    await gone.wait()
                    took = time.monotonic() - began
                    assert took < 2 * (KEEPALIVE_S + TIMEOUT_S) + SPARE_S, f"{took:.1f} s"
                    assert port.calls() == 0, "the place of the call is free again"

    asyncio.run(scene())


@pytest.mark.usefixtures("_quick")
def test_a_quiet_connection_is_left_alone(federation: Federation) -> None:
    """Pings keep it, and the server does not take them for too many."""

    async def scene() -> None:
        async def late(_request: bytes, _context: object) -> bytes:
            await asyncio.sleep(6 * KEEPALIVE_S)
            return b"here"

        handlers = {"Late": grpc.unary_unary_rpc_method_handler(late)}
        async with (
            serving(federation, handlers) as port,
            port.channel(federation.open("site-1")) as opened,
        ):
            call = opened.unary_unary(f"/{SERVICE}/Late")
            assert await call(b"", metadata=metadata()) == b"here"

    asyncio.run(scene())
