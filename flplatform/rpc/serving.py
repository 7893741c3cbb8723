"""A port: an asyncio gRPC server that admits one kind of certificate, guarded and with health."""

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from flplatform.core.errors import UnavailableError
from flplatform.rpc.channel import server_credentials, server_options
from flplatform.rpc.interceptors import Guard


def make_server(
    guard: Guard, max_connection_age_s: float, max_calls: int | None = None
) -> aio.Server:
    """Return a server on which every call passes `guard`.

    Args:
        guard: admits or refuses each call.
        max_connection_age_s: older connections are asked to reconnect.
        max_calls: calls in flight of all callers together; more are refused unseen.
    """
    return aio.server(
        interceptors=[guard],
        options=server_options(max_connection_age_s),
        maximum_concurrent_rpcs=max_calls,
    )


async def serve(
    server: aio.Server, address: str, *, key_pem: bytes, chain_pem: bytes, trusted_pem: bytes
) -> int:
    """Bind `host:port` (port 0 takes any), add `grpc.health.v1`, start; return the port's number.

    Raises:
        UnavailableError: the address cannot be bound.
    """
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    credentials = server_credentials(key_pem, chain_pem, trusted_pem)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise UnavailableError(
            f"cannot listen on {address}",
            hint="another process has the port, or the host has no such address; "
            "local/overrides.yml may set another",
        )
    await server.start()
    return int(port)
