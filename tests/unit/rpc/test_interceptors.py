import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from flplatform.core.errors import (
    FLError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.interceptors import MAX_CALLS, Rule, caller
from tests.support.federation import Federation, provision
from tests.unit.rpc.loopback import SERVICE, TOKEN, Port, metadata, serving

WHO = f"/{SERVICE}/Who"


async def who(_request: bytes, _context: object) -> bytes:
    me = caller()
    return f"{me.identity.name} {me.token} {me.peer.startswith('ipv')}".encode()


HANDLERS = {"Who": grpc.unary_unary_rpc_method_handler(who)}


async def call(
    port: Port, kit: Any, token: str | None = TOKEN, method: str = WHO, more: Any = ()
) -> bytes:
    sent = (*(metadata(token) if token is not None else ()), *more)
    async with port.channel(kit) as channel:
        return await channel.unary_unary(method)(b"", metadata=sent, timeout=30)


async def refusal(awaitable: Awaitable[Any]) -> FLError:
    with pytest.raises(aio.AioRpcError) as caught:
        await awaitable
    return from_rpc(caught.value)


def test_the_servicer_knows_who_calls(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            answer = await call(port, federation.open("site-1"))
            assert answer == f"site-1 {TOKEN} True".encode()
            assert port.refusals == []

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("token", "more"),
    [
        (None, ()),
        ("", ()),
        ("dead", ()),
        (TOKEN, metadata("another")),
        (TOKEN, metadata(TOKEN)),
    ],
    ids=["none", "empty", "dead", "two", "twice"],
)
def test_without_one_live_token_nothing_is_served(
    federation: Federation, token: str | None, more: Any
) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            error = await refusal(call(port, federation.open("site-1"), token, more=more))
            assert type(error) is UnauthenticatedError
            ((method, name, noted),) = port.refusals
            assert (method, name, str(noted)) == (WHO, "site-1", str(error))

    asyncio.run(scene())


def test_a_token_is_bound_to_its_certificate(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            error = await refusal(call(port, federation.open("site-2")))
            assert (type(error), error.rule) == (UnauthenticatedError, "token")

    asyncio.run(scene())


def test_a_method_without_a_rule_is_refused(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS, rules={}) as port:
            error = await refusal(call(port, federation.open("site-1")))
            assert (type(error), error.rule) == (PermissionDeniedError, "undeclared_method")

    asyncio.run(scene())


def test_a_method_that_does_not_exist(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            with pytest.raises(aio.AioRpcError) as caught:
                await call(port, federation.open("site-1"), method=f"/{SERVICE}/Nothing")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scene())


def test_a_rule_may_do_without_a_token(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS, {WHO: Rule(token=False)}) as port:
            answer = await call(port, federation.open("site-2"), "ignored")
            assert answer == b"site-2  True", "a token that was not checked is not passed on"

    asyncio.run(scene())


@pytest.mark.parametrize("stranger", ["admin", "elsewhere"])
def test_a_certificate_that_tls_lets_in_must_still_be_a_site_of_the_project(
    federation: Federation, tmp_path: Path, stranger: str
) -> None:
    """As if one issuer had issued for others too: the URI decides."""
    if stranger == "admin":
        kit, secret, kind = federation.open("admin"), federation.passphrase("admin"), "admin"
    else:
        kit, secret, kind = provision(tmp_path, project=stranger).open("site-1"), None, "site"
    roots = kit.trust.tls_roots(kind)

    async def scene() -> None:
        async with serving(federation, HANDLERS, {WHO: Rule(token=False)}, roots=roots) as port:
            async with port.channel(kit, secret) as channel:
                error = await refusal(channel.unary_unary(WHO)(b"", timeout=30))
            assert (type(error), error.rule) == (UnauthenticatedError, "identity")
            ((_, name, _),) = port.refusals
            assert name == "", "who it is was not established"

    asyncio.run(scene())


def test_revoking_ends_a_live_channel(tmp_path: Path) -> None:
    federation = provision(tmp_path)

    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            port.tokens["2"] = federation.open("site-2").identity.fingerprint
            one, two = federation.open("site-1"), federation.open("site-2")
            async with port.channel(one) as first, port.channel(two) as second:
                assert await first.unary_unary(WHO)(b"", metadata=metadata())
                federation.revoke("site-1")
                port.trust = federation.open("server").trust
                error = await refusal(first.unary_unary(WHO)(b"", metadata=metadata()))
                assert type(error) is UnauthenticatedError
                assert "revoked" in error.message
                assert await second.unary_unary(WHO)(b"", metadata=metadata("2"))

    asyncio.run(scene())


def test_a_call_that_waited_is_refused_if_its_certificate_was_revoked_meanwhile(
    tmp_path: Path,
) -> None:
    federation = provision(tmp_path)

    async def scene() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def wait(_request: bytes, _context: object) -> bytes:
            entered.set()
            await leave.wait()
            return b"a secret of now"

        handlers = {"Who": grpc.unary_unary_rpc_method_handler(wait)}
        async with serving(federation, handlers) as port:
            waiting = asyncio.create_task(refusal(call(port, federation.open("site-1"))))
            await asyncio.wait_for(entered.wait(), 30)
            federation.revoke("site-1")
            port.trust = federation.open("server").trust
            leave.set()
            assert "revoked" in (await waiting).message
            assert len(port.refusals) == 1

    asyncio.run(scene())


def test_an_expired_certificate_ends_a_live_channel(federation: Federation) -> None:
    async def scene() -> None:
        async with serving(federation, HANDLERS) as port:
            kit = federation.open("site-1")
            async with port.channel(kit) as channel:
                assert await channel.unary_unary(WHO)(b"", metadata=metadata())
                port.now = kit.identity.not_after + timedelta(seconds=1)
                error = await refusal(channel.unary_unary(WHO)(b"", metadata=metadata()))
                assert type(error) is UnauthenticatedError
                assert "expired" in error.message
                port.now = datetime.now(UTC)
                assert await channel.unary_unary(WHO)(b"", metadata=metadata())

    asyncio.run(scene())


def test_streams_end_when_their_certificate_does(federation: Federation) -> None:
    """Both directions; what was sent before stays, what follows is refused."""
    received: list[bytes] = []

    async def count(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"0"
        await go_on.wait()
        yield b"1"

    async def take(messages: AsyncIterator[bytes], _context: object) -> bytes:
        async for message in messages:
            received.append(message)
            taken.set()
        return b""

    handlers = {
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Take": grpc.stream_unary_rpc_method_handler(take),
    }
    taken, go_on = asyncio.Event(), asyncio.Event()

    async def scene() -> None:
        async with serving(federation, handlers) as port:
            kit = federation.open("site-1")
            expired = kit.identity.not_after + timedelta(seconds=1)
            async with port.channel(kit) as channel:
                upload = channel.stream_unary(f"/{SERVICE}/Take")(metadata=metadata())
                await upload.write(b"before")
                await taken.wait()
                port.now = expired
                await upload.write(b"after")
                error = await refusal(upload)
                assert type(error) is UnauthenticatedError
                assert received == [b"before"]

                port.now = None
                download = channel.unary_stream(f"/{SERVICE}/Count")(b"", metadata=metadata())
                items = aiter(download)
                assert await anext(items) == b"0"
                port.now = expired
                go_on.set()
                assert type(await refusal(anext(items))) is UnauthenticatedError
                assert len(port.refusals) == 2

    asyncio.run(scene())


def test_health_needs_a_site_certificate_and_no_token(federation: Federation) -> None:
    health = health_aio.HealthServicer()

    def add(server: aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)

    async def scene() -> None:
        async with serving(federation, HANDLERS, more=add) as port:
            await health.set("", health_pb2.HealthCheckResponse.SERVING)
            request = health_pb2.HealthCheckRequest()
            for name in ("site-1", "site-2"):
                async with port.channel(federation.open(name)) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    answer = await stub.Check(request, timeout=30)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    watch = stub.Watch(request, timeout=30)
                    assert (await watch.read()).status == answer.status
                    watch.cancel()
            port.now = datetime(2100, 1, 1, tzinfo=UTC)
            async with port.channel(federation.open("site-1")) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                assert type(await refusal(stub.Check(request))) is UnauthenticatedError

    asyncio.run(scene())


def test_calls_in_flight_are_limited_per_certificate(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_CALLS > 8
    go_on, inside = asyncio.Event(), asyncio.Semaphore(0)

    async def wait(_request: bytes, _context: object) -> bytes:
        inside.release()
        await go_on.wait()
        return b"done"

    handlers = {**HANDLERS, "Wait": grpc.unary_unary_rpc_method_handler(wait)}

    async def scene() -> None:
        async with serving(federation, handlers, max_calls=3) as port:
            port.tokens["2"] = federation.open("site-2").identity.fingerprint
            one, two = federation.open("site-1"), federation.open("site-2")
            async with port.channel(one) as first, port.channel(two) as second:
                method = first.unary_unary(f"/{SERVICE}/Wait")
                waiting = [method(b"", metadata=metadata()) for _ in range(3)]
                for _ in waiting:
                    await inside.acquire()
                error = await refusal(method(b"", metadata=metadata()))
                assert (type(error), error.rule) == (ResourceExhaustedError, "max_calls")
                assert await second.unary_unary(WHO)(b"", metadata=metadata("2"))
                waiting[0].cancel()  # a cancelled call gives its place back, and so do ended ones
                while type(await answer_of(first)) is not bytes:
                    await asyncio.sleep(0)
                go_on.set()
                assert await waiting[1] == await waiting[2] == b"done"
                for _ in range(5):
                    assert await first.unary_unary(WHO)(b"", metadata=metadata())

    async def answer_of(channel: aio.Channel) -> object:
        try:
            return await channel.unary_unary(WHO)(b"", metadata=metadata())
        except aio.AioRpcError as error:
            return from_rpc(error)

    asyncio.run(scene())


@pytest.mark.parametrize("method", ["Unary", "Down", "Up"])
def test_a_defect_is_shown_by_its_id_only(
    federation: Federation, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    async def unary(_request: bytes, _context: object) -> bytes:
        raise ValueError("the secret text")

    async def down(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"one"
        raise ValueError("the secret text")

    async def up(messages: AsyncIterator[bytes], _context: object) -> bytes:
        async for _ in messages:
            raise ValueError("the secret text")
        return b""

    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Up": grpc.stream_unary_rpc_method_handler(up),
    }

    async def call(channel: aio.Channel) -> None:
        name = f"/{SERVICE}/{method}"
        if method == "Unary":
            await channel.unary_unary(name)(b"", metadata=metadata())
        elif method == "Down":
            async for _ in channel.unary_stream(name)(b"", metadata=metadata()):
                pass
        else:
            upload = channel.stream_unary(name)(metadata=metadata())
            await upload.write(b"")
            await upload

    async def scene() -> aio.AioRpcError:
        kit = federation.open("site-1")
        async with serving(federation, handlers) as port, port.channel(kit) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await call(channel)
            return caught.value

    with caplog.at_level(logging.ERROR):
        status = asyncio.run(scene())
    error = from_rpc(status)
    assert type(error) is InternalError
    assert "secret" not in f"{status!r} {error}"
    correlation_id = error.message.split()[-1]
    (record,) = [item for item in caplog.records if "failed" in item.message]
    assert correlation_id in record.message
    assert "the secret text" in str(record.exc_info[1])


def test_our_own_errors_pass_whole(federation: Federation) -> None:
    async def missing(_request: bytes, _context: object) -> bytes:
        raise NotFoundError("no run 7", field="run", hint="list_runs")

    async def scene() -> None:
        handlers = {"Who": grpc.unary_unary_rpc_method_handler(missing)}
        async with serving(federation, handlers) as port:
            error = await refusal(call(port, federation.open("site-1")))
            assert (type(error), str(error)) == (NotFoundError, "run: no run 7; list_runs")

    asyncio.run(scene())


def test_streams_both_ways_at_once_are_not_served(federation: Federation) -> None:
    async def echo(messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    async def scene() -> None:
        handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
        kit = federation.open("site-1")
        async with serving(federation, handlers) as port, port.channel(kit) as channel:
            both = channel.stream_stream(f"/{SERVICE}/Echo")(metadata=metadata())
            with contextlib.suppress(aio.AioRpcError):  # known here already, or when it is read
                await both.write(b"x")
            with pytest.raises(aio.AioRpcError):
                await both.read()

    asyncio.run(scene())


def test_every_call_is_timed_by_method_and_outcome(federation: Federation) -> None:
    async def fail(_request: bytes, _context: object) -> bytes:
        raise NotFoundError("nothing here")

    async def stream(_request: bytes, _context: object) -> AsyncIterator[bytes]:
        yield b"x"

    handlers = {
        **HANDLERS,
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }

    async def scene() -> None:
        async with serving(federation, handlers) as port:
            kit = federation.open("site-1")
            await call(port, kit)
            await refusal(call(port, kit, None))
            await refusal(call(port, kit, method=f"/{SERVICE}/Fail"))
            async with port.channel(kit) as channel:
                got = channel.unary_stream(f"/{SERVICE}/Stream")(b"", metadata=metadata())
                assert [item async for item in got] == [b"x"]
            assert [(name, key) for name, key, _ in port.took] == [
                ("rpc", "Who ok"),
                ("rpc", f"Who {UnauthenticatedError.code}"),
                ("rpc", f"Fail {NotFoundError.code}"),
                ("rpc", "Stream ok"),
            ]
            assert all(0 <= seconds < 20 for _, _, seconds in port.took)

    asyncio.run(scene())
