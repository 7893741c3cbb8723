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
MAX_DETAIL_CHARS = 2000

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
    return _STATUS.get(type(error), grpc.StatusCode.INTERNAL)


def error_metadata(error: FLError) -> tuple[tuple[str, bytes], ...]:
    """Return trailing metadata from which the other side rebuilds `error`."""
    fields = {
        "code": error.code,
        "message": error.message[:MAX_DETAIL_CHARS],
        "field": error.field[:200],
        "hint": error.hint[:500],
        "rule": error.rule[:200],
    }
    return ((ERROR_KEY, json.dumps(fields).encode()),)


async def abort(context: "aio.ServicerContext[Any, Any]", error: FLError) -> None:
    """End the call with `error`; never returns."""
    # Control characters would break the header; the whole text travels in the metadata.
    details = str(error)[:MAX_DETAIL_CHARS].encode("ascii", "backslashreplace").decode()
    await context.abort(status_of(error), details, error_metadata(error))


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
    return cls(f"{error.code().name.lower()}: {error.details() or 'no details'}")
