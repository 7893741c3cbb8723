"""The one translation between `FLError` and gRPC statuses, both ways."""

import json
from typing import Any

import grpc
from grpc import aio

from flplatform.core.errors import (
    AlreadyExistsError,
    ConfigError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FLError,
    InternalError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

ERROR_KEY = "flp-error-bin"
MAX_DETAIL_CHARS = 1000
MAX_BYTES = {"code": 60, "message": 4000, "field": 400, "hint": 1000, "rule": 400}
"""What each part of an error may take: all of it must fit into 16 KiB of metadata, base64 and
the details included, or gRPC puts an error of its own in its place."""

REPLACED_TOKEN = "replaced token"  # noqa: S105 - the name of a rule
"""Rule by which a token is refused after which its site has registered again."""

_SILENT = "Endpoint closing", "ping timeout"
_FOREIGN = "OK", "Socket closed", "Handshake read failed", "Failed parsing HTTP/2"
"""What gRPC says of a peer that says nothing, and of one that ends or garbles the handshake."""

_STATUS: dict[type[FLError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DataLossError: grpc.StatusCode.DATA_LOSS,
    InternalError: grpc.StatusCode.INTERNAL,
}
_BY_CODE = {cls.code: cls for cls in _STATUS}
_BY_STATUS: dict[grpc.StatusCode, type[FLError]] = {
    status: cls for cls, status in reversed(_STATUS.items())
}
_BY_STATUS[grpc.StatusCode.CANCELLED] = UnavailableError
# What gRPC itself says when the other side has no such method: an older or newer release.
_BY_STATUS[grpc.StatusCode.UNIMPLEMENTED] = FailedPreconditionError


def status_of(error: FLError) -> grpc.StatusCode:
    """Return the status that carries `error`."""
    known = (_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
    return next(known, grpc.StatusCode.INTERNAL)


def error_metadata(error: FLError) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata from which the other side rebuilds `error`."""
    fields = {name: _cut(str(getattr(error, name)), most) for name, most in MAX_BYTES.items()}
    return ((ERROR_KEY, _encode(fields)),)


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def _cut(text: str, most_bytes: int) -> str:
    """Shorten `text` until it takes at most so many bytes as JSON."""
    while len(_encode(text)) > most_bytes:
        text = text[: len(text) * 3 // 4]
    return text


async def abort(context: "aio.ServicerContext[Any, Any]", error: FLError) -> None:
    """End the call with `error`; never returns."""
    # For tools that show only the details; the text itself travels in the metadata.
    details = str(error).encode("ascii", "backslashreplace")[:MAX_DETAIL_CHARS].decode()
    await context.abort(status_of(error), details, error_metadata(error))


def has_error(error: aio.AioRpcError) -> bool:
    """Return whether the other side raised an error, and not gRPC itself."""
    return any(key == ERROR_KEY for key, _ in error.trailing_metadata() or ())


def from_rpc(error: grpc.RpcError) -> FLError:
    """Return the `FLError` that the other side raised, or the nearest one for gRPC's own."""
    assert isinstance(error, aio.AioRpcError)
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                fields = json.loads(value)
                cls = _BY_CODE.get(fields.pop("code"), InternalError)
                built = cls(str(fields.pop("message")))
                built.field, built.hint = str(fields["field"]), str(fields["hint"])
                built.rule = str(fields["rule"])
            except (ValueError, KeyError, AttributeError, TypeError):
                break
            return built
    cls = _BY_STATUS.get(error.code(), InternalError)
    details = error.details() or "no details"
    if cls is UnavailableError and any(text in details for text in _SILENT):
        return UnavailableError("no connection: the server does not answer")
    if cls is UnavailableError and "failed to connect" in details:
        # gRPC tells the whole story of all addresses; its last clause is the reason.
        reason = details.rpartition(": ")[2]
        if reason.startswith(_FOREIGN):
            reason = "what answers there does not do so as the server: is the port right?"
        return UnavailableError(f"no connection: {reason}")
    if cls is UnavailableError and "Socket closed" in details:
        return UnavailableError("the connection broke")
    return cls(f"{error.code().name.lower()}: {details}")
