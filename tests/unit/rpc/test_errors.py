import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc import aio

from flplatform.core import errors
from flplatform.core.errors import (
    ConfigError,
    FailedPreconditionError,
    FLError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.rpc.errors import ERROR_KEY, abort, error_metadata, from_rpc, status_of

CLASSES = [
    item
    for item in vars(errors).values()
    if isinstance(item, type) and issubclass(item, FLError) and item is not FLError
]
METHOD = "/test/fail"


class Unknown(UnavailableError):
    """An error of some later layer."""


@asynccontextmanager
async def failing(error: FLError | None = None) -> AsyncIterator[aio.UnaryUnaryMultiCallable]:
    async def fail(_: bytes, context: aio.ServicerContext) -> bytes:
        if error is not None:
            await abort(context, error)
        await context.abort(grpc.StatusCode.ABORTED, "gRPC's own")

    server = aio.server()
    handlers = {"fail": grpc.unary_unary_rpc_method_handler(fail)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # As ours: what a server says in the metadata of an error must fit into this.
    options = [("grpc.max_metadata_size", 16 << 10)]
    async with aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel.unary_unary(METHOD)
    await server.stop(0)


def over_the_wire(error: FLError) -> tuple[FLError, aio.AioRpcError]:
    async def call() -> tuple[FLError, aio.AioRpcError]:
        async with failing(error) as method:
            with pytest.raises(aio.AioRpcError) as caught:
                await method(b"", timeout=30)
            return from_rpc(caught.value), caught.value

    return asyncio.run(call())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_every_class_comes_back_as_it_was(cls: type[FLError]) -> None:
    error = cls("no such thing: «ä»\n\x1b[31m", hint="look → there")
    error.field, error.rule = "sites[2].name", "own_tasks_only"
    back, status = over_the_wire(error)
    assert type(back) is cls
    assert (back.message, back.field, back.hint, back.rule) == (
        error.message,
        error.field,
        error.hint,
        error.rule,
    )
    assert str(back) == str(error)
    assert status.code() == status_of(error)
    assert status.details().isascii()


def test_all_problems_of_a_file_come_back() -> None:
    error = ConfigError("job.yml has 2 problems", problems=("line 1: a", "line 2: b"))
    back, _ = over_the_wire(error)
    assert str(back) == str(error)


@pytest.mark.parametrize("text", ["x", "é", "\U0001f600", "\x00", "\n", '"', "\ud800"])
def test_a_long_text_of_any_script_is_cut_and_not_lost(text: str) -> None:
    """What does not fit into the metadata would be replaced by an error that is retried."""
    error = InvalidArgumentError(text * 20_000, field=text * 999, hint=text * 999, rule=text * 999)
    back, status = over_the_wire(error)
    assert type(back) is InvalidArgumentError
    assert status.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert len(back.message) > 300


def test_a_class_unknown_to_the_table_travels_as_its_base() -> None:
    back, status = over_the_wire(Unknown("gone"))
    assert (type(back), back.message) == (UnavailableError, "gone")
    assert status.code() == grpc.StatusCode.UNAVAILABLE


def test_plain_errors_of_ours_are_defects() -> None:
    assert type(over_the_wire(FLError("odd"))[0]) is InternalError


def test_what_grpc_itself_says_becomes_the_nearest_error() -> None:
    async def calls() -> None:
        async with failing() as method:
            with pytest.raises(aio.AioRpcError) as caught:
                await method(b"", timeout=30)
            assert type(from_rpc(caught.value)) is InternalError
            assert str(from_rpc(caught.value)) == "aborted: gRPC's own"

    asyncio.run(calls())
    nearest = {
        grpc.StatusCode.UNIMPLEMENTED: FailedPreconditionError,
        grpc.StatusCode.CANCELLED: UnavailableError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
        grpc.StatusCode.DATA_LOSS: errors.DataLossError,
        grpc.StatusCode.UNKNOWN: InternalError,
    }
    for code, cls in nearest.items():
        error = from_rpc(aio.AioRpcError(code, aio.Metadata(), aio.Metadata()))
        assert type(error) is cls
        assert error.message == f"{code.name.lower()}: no details"


def test_nobody_serving_is_unavailable() -> None:
    async def call() -> FLError:
        async with aio.insecure_channel("127.0.0.1:1") as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await channel.unary_unary(METHOD)(b"", timeout=30)
            return from_rpc(caught.value)

    assert type(asyncio.run(call())) is UnavailableError


WRONG_PORT = "what answers there does not do so as the server: is the port right?"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("UNKNOWN: ipv4:127.0.0.1:1: Failed to connect: Connection refused", "Connection refused"),
        ("UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed: SSL_ERROR_SSL: error: OK", WRONG_PORT),
        ("UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed", WRONG_PORT),
        ("UNAVAILABLE: ipv4:127.0.0.1:1: Handshake read failed (Socket closed)", WRONG_PORT),
        ("INTERNAL: ipv4:127.0.0.1:1: Failed parsing HTTP/2 (Expected SETTINGS)", WRONG_PORT),
        (
            "UNAVAILABLE: ipv4:127.0.0.1:1: Handshake read failed (Endpoint closing)",
            "the server does not answer",
        ),
    ],
)
def test_why_there_is_no_connection(said: str, meant: str) -> None:
    details = f"failed to connect to all addresses; last error: {said}"
    assert grpcs_own(details).message == f"no connection: {meant}"


def test_what_is_said_of_a_connection_that_there_was() -> None:
    silent = grpcs_own("Stream removed (ping timeout)")
    assert silent.message == "no connection: the server does not answer"
    assert grpcs_own("Socket closed").message == "the connection broke"


def grpcs_own(details: str) -> FLError:
    none, code = aio.Metadata(), grpc.StatusCode.UNAVAILABLE
    error = from_rpc(aio.AioRpcError(code, none, none, details))
    assert type(error) is UnavailableError
    return error


def forged(value: bytes | str) -> FLError:
    trailing = aio.Metadata((ERROR_KEY, value))
    return from_rpc(aio.AioRpcError(grpc.StatusCode.NOT_FOUND, aio.Metadata(), trailing, "gone"))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b"{}",
        b'{"code": "not_found"}',
        b'{"code": ["a"], "message": "", "field": "", "hint": "", "rule": ""}',
        "text",
    ],
)
def test_odd_metadata_falls_back_to_the_status(value: bytes | str) -> None:
    error = forged(value)
    assert type(error) is errors.NotFoundError
    assert error.message == "not_found: gone"


def test_the_code_of_a_newer_release_is_an_internal_error() -> None:
    fields = {"code": "quota", "message": "too much", "field": "", "hint": "", "rule": "r"}
    error = forged(json.dumps(fields).encode())
    assert (type(error), error.message, error.rule) == (InternalError, "too much", "r")


def test_metadata_is_bounded() -> None:
    ((key, value),) = error_metadata(InvalidArgumentError("\x00" * 10**6, hint="\x00" * 10**6))
    assert key == ERROR_KEY
    assert len(value) < 8 << 10
