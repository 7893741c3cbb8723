"""A real aio server on loopback TLS, with real kits and the real guard."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from flplatform.core.errors import FLError, UnauthenticatedError
from flplatform.rpc.channel import TOKEN_KEY, open_channel, server_credentials, server_options
from flplatform.rpc.interceptors import MAX_CALLS, Caller, Guard, Rule
from flplatform.security.identity import Identity, TrustStore, identity_of
from flplatform.security.kit import Kit
from tests.support.federation import Federation

TOKEN = "the token of site-1"
SERVICE = "flplatform.test.Echo"
DEADLINE_S = 60.0


@dataclass
class Port:
    """What the guard of one port knows; change it while calls run.

    Attributes:
        trust: certificates are held against it.
        now: the time at which they are.
        tokens: token → fingerprint that it is bound to.
        refusals: (method, name, error) of each refused call.
        took: (`rpc`, method and outcome, seconds) of each call.
    """

    kit: Kit
    trust: TrustStore
    now: datetime | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    refusals: list[tuple[str, str, FLError]] = field(default_factory=list)
    took: list[tuple[str, str, float]] = field(default_factory=list)
    number: int = 0

    def identify(self, certificate: bytes) -> Identity:
        identity = identity_of(certificate)
        if identity.kind != "site" or identity.project != self.trust.project:
            raise UnauthenticatedError(f"{identity.uri} is no site", rule="identity")
        self.trust.check(identity, self.now or datetime.now(UTC))
        return identity

    def check_token(self, caller: Caller) -> None:
        if self.tokens.get(caller.token) != caller.identity.fingerprint:
            raise UnauthenticatedError("the token is not valid", rule="token")

    def guard(self, rules: Mapping[str, Rule], max_calls: int = MAX_CALLS) -> Guard:
        def refused(method: str, name: str, _peer: str, error: FLError) -> None:
            self.refusals.append((method, name, error))

        self._guard = Guard(
            self.identify,
            self.check_token,
            rules,
            refused,
            lambda *call: self.took.append(call),
            max_calls,
        )
        return self._guard

    def calls(self) -> int:
        """Return how many calls are in flight."""
        return self._guard._calls.total()

    def channel(self, kit: Kit, passphrase: str | None = None) -> aio.Channel:
        """Open a channel with a kit's certificate."""
        return open_channel(
            f"localhost:{self.number}",
            key_pem=kit.key_pem(passphrase),
            chain_pem=kit.chain,
            trusted_pem=self.kit.trust.tls_roots("server"),
        )


@asynccontextmanager
async def serving(
    federation: Federation,
    handlers: Mapping[str, grpc.RpcMethodHandler],
    rules: Mapping[str, Rule] | None = None,
    more: Callable[[aio.Server], Any] = lambda _: None,
    roots: bytes = b"",
    max_calls: int = MAX_CALLS,
    number: int = 0,
) -> AsyncIterator[Port]:
    """Serve `handlers` as methods of SERVICE; without `rules` each needs a token.

    Args:
        more: adds further services.
        roots: trusted for clients instead of the federation's site issuer.
        max_calls: control calls in flight per certificate.
        number: of the port; 0 takes any.
    """
    kit = federation.open("server")
    port = Port(kit, kit.trust)
    port.tokens[TOKEN] = federation.open("site-1").identity.fingerprint
    if rules is None:
        rules = {f"/{SERVICE}/{name}": Rule() for name in handlers}
    server = aio.server(interceptors=[port.guard(rules, max_calls)], options=server_options(3600))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    more(server)
    credentials = server_credentials(kit.key_pem(), kit.chain, roots or kit.trust.tls_roots("site"))
    port.number = server.add_secure_port(f"127.0.0.1:{number}", credentials)
    await server.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield port
    finally:
        await server.stop(0)


def metadata(token: str = TOKEN) -> tuple[tuple[str, str], ...]:
    return ((TOKEN_KEY, token),)


def kit_of(federation: Federation, name: str = "site-1") -> Kit:
    return federation.open(name)


def file_of(folder: Path, data: bytes) -> Path:
    path = folder / "to send"
    path.write_bytes(data)
    return path
