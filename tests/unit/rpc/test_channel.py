import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest
from grpc import aio

from flplatform.rpc import channel
from flplatform.rpc.channel import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    open_channel,
    server_credentials,
    server_options,
)
from flplatform.rpc.interceptors import Rule
from tests.support.federation import Federation, provision
from tests.unit.rpc.loopback import SERVICE, serving


async def echo(request: bytes, _context: object) -> bytes:
    return request


ECHO = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
OPEN = {f"/{SERVICE}/Echo": Rule(token=False)}


async def say(federation: Federation, name: str, port: int, text: bytes = b"hello") -> bytes:
    kit = federation.open(name)
    secret = federation.passphrase(name) if kit.identity.kind == "admin" else None
    async with open_channel(
        f"localhost:{port}",
        key_pem=kit.key_pem(secret),
        chain_pem=kit.chain,
        trusted_pem=kit.trust.tls_roots("server"),
    ) as opened:
        return await opened.unary_unary(f"/{SERVICE}/Echo")(text, timeout=30)


def test_no_option_is_given_twice() -> None:
    names = [name for name, _ in server_options(60)]
    assert len(set(names)) == len(names)


def test_the_server_permits_the_pings_that_both_ends_send() -> None:
    options = dict(server_options(60))
    assert (
        options["grpc.http2.min_ping_interval_without_data_ms"] < options["grpc.keepalive_time_ms"]
    )
    assert options["grpc.http2.max_pings_without_data"] == 0


def test_limits() -> None:
    options = dict(server_options(1.5))
    assert options["grpc.max_connection_age_ms"] == 1500
    assert options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES == 4 << 20
    assert CHUNK_BYTES < MAX_MESSAGE_BYTES
    assert options["grpc.so_reuseport"] == 0, "two servers would share a port in silence"


def test_kit_to_kit(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            assert await say(federation, "site-1", port.number) == b"hello"

    asyncio.run(scene())


def test_a_server_that_stands_still_for_a_moment_is_reached(federation: Federation) -> None:
    """The handshake takes that much longer; a console does not try again."""

    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            inner = port.number

            async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await asyncio.sleep(1.5)
                ends = await asyncio.open_connection("127.0.0.1", inner)
                await asyncio.gather(passing(reader, ends[1]), passing(ends[0], writer))

            async with await asyncio.start_server(slowly, "127.0.0.1", 0) as proxy:
                assert await say(federation, "site-1", proxy.sockets[0].getsockname()[1])

    asyncio.run(scene())


async def passing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(65536):
            writer.write(part)
            await writer.drain()
    writer.close()


def test_a_message_beyond_the_limit_is_refused(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            with pytest.raises(aio.AioRpcError) as caught:
                await say(federation, "site-1", port.number, bytes(MAX_MESSAGE_BYTES + 1))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(scene())


@pytest.mark.parametrize("stranger", ["admin", "server", "other"])
def test_only_the_issuer_of_the_port_opens_it(
    federation: Federation, tmp_path: Path, stranger: str
) -> None:
    """An admin, a server, and a site of another federation fail in the handshake."""
    other = provision(tmp_path) if stranger == "other" else federation
    name = "site-1" if stranger == "other" else stranger

    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            with pytest.raises(aio.AioRpcError) as caught:
                await say(other, name, port.number)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scene())


@pytest.mark.parametrize("impostor", ["site-2", "other"])
def test_a_client_trusts_the_server_issuer_alone(
    federation: Federation, tmp_path: Path, impostor: str
) -> None:
    """A site that plays the server, and the server of another federation."""
    kit = provision(tmp_path).open("server") if impostor == "other" else federation.open(impostor)

    async def scene() -> None:
        server = aio.server(options=server_options(60))
        handlers = grpc.method_handlers_generic_handler(SERVICE, ECHO)
        server.add_generic_rpc_handlers((handlers,))
        roots = federation.open("server").trust.tls_roots("site")
        credentials = server_credentials(kit.key_pem(), kit.chain, roots)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        with pytest.raises(aio.AioRpcError) as caught:
            await say(federation, "site-1", port)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await server.stop(0)

    asyncio.run(scene())


def test_the_host_must_be_in_the_certificate(tmp_path: Path) -> None:
    federation = provision(tmp_path, addresses=("fl.example.org",))

    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            with pytest.raises(aio.AioRpcError) as caught:
                await say(federation, "site-1", port.number)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scene())


def test_nobody_without_a_certificate_gets_in(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, ECHO, OPEN) as port:
            roots = port.kit.trust.tls_roots("server")
            bare = grpc.ssl_channel_credentials(roots)
            async with aio.secure_channel(f"localhost:{port.number}", bare) as opened:
                with pytest.raises(aio.AioRpcError) as caught:
                    await opened.unary_unary(f"/{SERVICE}/Echo")(b"", timeout=30)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(scene())


def test_channels_share_no_connection() -> None:
    """Two sites in one process must not use each other's certificate."""
    assert ("grpc.use_local_subchannel_pool", 1) in options_of_a_channel()


def options_of_a_channel() -> list[tuple[str, object]]:
    seen: list[tuple[str, object]] = []
    original = channel.aio.secure_channel
    try:
        channel.aio.secure_channel = lambda *_, options: seen.extend(options)
        open_channel("h:1", key_pem=b"", chain_pem=b"", trusted_pem=b"", extra=[("x", 1)])
    finally:
        channel.aio.secure_channel = original
    assert ("x", 1) in seen
    return seen
