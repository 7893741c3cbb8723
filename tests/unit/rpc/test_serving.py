import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flplatform.core.errors import ResourceExhaustedError, UnavailableError
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.serving import make_server, serve
from tests.support.federation import Federation
from tests.unit.rpc.loopback import Port


@asynccontextmanager
async def a_port(
    federation: Federation, address: str = "127.0.0.1:0", max_calls: int | None = None
) -> AsyncIterator[Port]:
    kit = federation.open("server")
    port = Port(kit, kit.trust)
    server = make_server(port.guard({}), 60.0, max_calls)
    try:
        port.number = await serve(
            server,
            address,
            key_pem=kit.key_pem(),
            chain_pem=kit.chain,
            trusted_pem=kit.trust.tls_roots("site"),
        )
        yield port
    finally:
        await server.stop(0)


def test_health_is_served_and_every_call_is_guarded(federation: Federation) -> None:
    async def scene() -> None:
        async with (
            a_port(federation) as port,
            port.channel(federation.open("site-1")) as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            port.now = datetime(2999, 1, 1, tzinfo=UTC)
            with pytest.raises(aio.AioRpcError, match="expired"):
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)

    asyncio.run(scene())


def test_calls_of_all_callers_together_are_limited(federation: Federation) -> None:
    async def scene() -> None:
        async with (
            a_port(federation, max_calls=2) as port,
            port.channel(federation.open("site-1")) as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            watching = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for each in watching:
                await each.read()
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert type(from_rpc(caught.value)) is ResourceExhaustedError
            watching[0].cancel()
            async with asyncio.timeout(60):
                while True:
                    try:
                        await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
                        break
                    except aio.AioRpcError:
                        await asyncio.sleep(0.01)

    asyncio.run(scene())


@pytest.mark.parametrize("address", ["taken", "203.0.113.7:0"])
def test_an_address_that_cannot_be_had_is_named(federation: Federation, address: str) -> None:
    async def scene() -> None:
        async with a_port(federation) as port:
            asked = f"127.0.0.1:{port.number}" if address == "taken" else address
            with pytest.raises(UnavailableError) as caught:
                async with a_port(federation, asked):
                    pass
            assert f"cannot listen on {asked}" in str(caught.value)

    asyncio.run(scene())
