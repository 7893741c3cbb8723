"""The one chain that every call on every port passes.

In this order: certificate → identity → expiry and revocation → token bound to the certificate →
permission → errors. A method without a declared rule is refused, and identity never comes from a
message. On a stream the certificate is looked at again with every message.
"""

import asyncio
import contextvars
import inspect
import logging
import secrets
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc import aio

from flplatform.core.errors import (
    FLError,
    InternalError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.rpc.channel import TOKEN_KEY
from flplatform.rpc.errors import abort
from flplatform.security.identity import Identity

log = logging.getLogger(__name__)

HEALTH_PREFIX = "/grpc.health.v1.Health/"
MAX_CALLS = 32
"""Calls in flight per certificate, transfers not included."""

MAX_TRANSFERS = 8
"""Transfers in flight per certificate, those that wait for a slot included."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a method demands beyond a valid certificate of the port's issuer."""

    token: bool = True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the current call.

    Attributes:
        identity: from the certificate.
        peer: network address, for the audit.
        token: the presented token, empty where the method's rule needs none.
    """

    identity: Identity
    peer: str
    token: str = ""


_CALLER: contextvars.ContextVar[Caller] = contextvars.ContextVar("flplatform_caller")


def caller() -> Caller:
    """Return who makes the current call; only inside a servicer's method."""
    return _CALLER.get()


class Guard(aio.ServerInterceptor):
    """Admits or refuses each call of one port.

    Args:
        identify: PEM certificate → checked identity; raises UnauthenticatedError. Called for
            every call, so it caches parsing but not revocation and expiry.
        check_token: (caller) → None; raises UnauthenticatedError if the token is dead or bound
            to another certificate.
        rules: full method name → rule; a method that is missing is refused.
        refused: told about every refusal, for the audit.
        took: told how long each call took: (`rpc`, its method and outcome, seconds).
        max_calls: most calls in flight per certificate, transfers not included.
    """

    def __init__(
        self,
        identify: Callable[[bytes], Identity],
        check_token: Callable[[Caller], None],
        rules: Mapping[str, Rule],
        refused: Callable[[str, str, str, FLError], None],
        took: Callable[[str, str, float], None] = lambda *_: None,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._max_calls = max_calls
        self._took = took
        self._identify = identify
        self._check_token = check_token
        self._rules = rules
        self._refused = refused
        self._calls: Counter[tuple[str, bool]] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler: only the wrapped handler sees the certificate."""
        method = str(handler_call_details.method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        admit = self._admitter(method, handler_call_details)
        if handler.request_streaming and handler.response_streaming:
            raise InternalError(f"{method}: bidirectional streams are not used here")
        if handler.response_streaming:
            writes = inspect.iscoroutinefunction(handler.unary_stream)  # by context.write
            return grpc.unary_stream_rpc_method_handler(
                self._single(method, admit, handler.unary_stream, writing=True)
                if writes
                else self._streaming(method, admit, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._single(method, admit, handler.stream_unary, streaming=True),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._single(method, admit, handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _admitter(self, method: str, details: grpc.HandlerCallDetails) -> Callable[[Any], Caller]:
        rule = self._rules.get(method)
        if rule is None and method.startswith(HEALTH_PREFIX):
            rule = Rule(token=False)
        metadata: Iterable[Any] = details.invocation_metadata or ()
        tokens = [value for key, value in metadata if key == TOKEN_KEY]

        def admit(context: Any) -> Caller:
            peer = str(context.peer())
            name = ""
            try:
                identity = self._identify(_certificate(context))
                name = identity.name
                if rule is None:
                    raise PermissionDeniedError(
                        f"{method} is not served here", rule="undeclared_method"
                    )
                if not rule.token:
                    return Caller(identity, peer)
                if len(tokens) != 1 or not isinstance(tokens[0], str):
                    raise UnauthenticatedError("the call has no token", hint="register or log in")
                presented = Caller(identity, peer, tokens[0])
                self._check_token(presented)
            except FLError as error:
                self._refused(method, name, peer, error)
                raise
            return presented

        return admit

    def _enter(self, presented: Caller, transfer: bool) -> None:
        key = (presented.identity.fingerprint, transfer)
        most = MAX_TRANSFERS if transfer else self._max_calls
        if self._calls[key] >= most:
            raise ResourceExhaustedError(
                f"{presented.identity.name} has {most} {'transfers' if transfer else 'calls'} "
                "in flight",
                rule="max_transfers" if transfer else "max_calls",
                hint="try again when one of them has ended",
            )
        self._calls[key] += 1
        _CALLER.set(presented)

    def _leave(self, presented: Caller, transfer: bool) -> None:
        key = (presented.identity.fingerprint, transfer)
        self._calls[key] -= 1
        if not self._calls[key]:
            del self._calls[key]

    def _recheck(self, method: str, presented: Caller, context: Any) -> None:
        """End a running stream whose certificate was revoked or has expired since it began."""
        try:
            self._identify(_certificate(context))
        except FLError as error:
            self._refused(method, presented.identity.name, presented.peer, error)
            raise

    @contextmanager
    def _timed(self, method: str) -> Iterator[None]:
        """Tell how long a call took, and how it ended."""
        started, outcome = time.monotonic(), "ok"
        try:
            yield
        except FLError as error:
            outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            name = f"{method.rpartition('/')[2]} {outcome}"
            self._took("rpc", name, time.monotonic() - started)

    def _single(
        self,
        method: str,
        admit: Callable[[Any], Caller],
        behaviour: Callable[..., Awaitable[Any]],
        streaming: bool = False,
        writing: bool = False,
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            entered: Caller | None = None
            try:
                with self._timed(method):
                    presented = admit(context)
                    self._enter(presented, streaming or writing)
                    entered = presented
                    recheck = partial(self._recheck, method, presented, context)
                    reply = await behaviour(
                        _Checked(request, recheck) if streaming else request,
                        _CheckedWrites(context, recheck) if writing else context,
                    )
                    recheck()  # a call may have waited for long
                    return reply
            except (asyncio.CancelledError, aio.AbortError):
                raise
            except Exception as error:  # noqa: BLE001 - the one place that turns errors to statuses
                await abort(context, _public(method, error))
            finally:
                # Not before: what a peer does not read is held until its connection ends.
                if entered is not None:
                    self._leave(entered, streaming or writing)

        return call

    def _streaming(
        self,
        method: str,
        admit: Callable[[Any], Caller],
        behaviour: Callable[..., AsyncGenerator[Any, None]],
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                with self._timed(method):
                    presented = admit(context)
                    self._enter(presented, True)
                    try:
                        async with aclosing(behaviour(request, context)) as items:
                            async for item in items:
                                self._recheck(method, presented, context)
                                yield item
                    finally:
                        self._leave(presented, True)
            except (asyncio.CancelledError, aio.AbortError, GeneratorExit):
                raise
            except Exception as error:  # noqa: BLE001 - as above
                await abort(context, _public(method, error))

        return call


class _Checked:
    """A request stream that runs a check for each message before it is taken."""

    def __init__(self, messages: AsyncIterator[Any], check: Callable[[], None]) -> None:
        self._messages = messages
        self._check = check

    def __aiter__(self) -> "_Checked":
        return self

    async def __anext__(self) -> Any:
        message = await anext(self._messages)
        self._check()
        return message


class _CheckedWrites:
    """A context that runs a check for each message before it is sent."""

    def __init__(self, context: Any, check: Callable[[], None]) -> None:
        self._context = context
        self._check = check

    async def write(self, message: Any) -> None:
        self._check()
        await self._context.write(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _certificate(context: Any) -> bytes:
    certificates = list(context.auth_context().get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise UnauthenticatedError("no client certificate")
    return bytes(certificates[0])


def _public(method: str, error: Exception) -> FLError:
    """Return what the peer may see: our own errors whole, any other only by an id."""
    if isinstance(error, FLError):
        return error
    correlation_id = secrets.token_hex(4)
    log.error("%s failed [%s]", method, correlation_id, exc_info=error)
    return InternalError(
        f"internal error {correlation_id}", hint="the server's log has the details under this id"
    )
