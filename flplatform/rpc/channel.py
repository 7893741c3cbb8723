"""mTLS channels and servers: credentials, and every transport option in one place.

Both ends set the same options; docs/performance.md, «Transport options», tells what each of them
bought. Keepalive notices a frozen peer in seconds; the server permits exactly these pings. How much
is read at once is left to gRPC, which follows the traffic: a fixed large read costs each idle
connection that much memory.
"""

from collections.abc import Sequence

import grpc
from grpc import aio

CHUNK_BYTES = 1 << 20
"""Size of the chunks in which blobs travel."""

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's own default for one message, kept on purpose: big data goes through blob streams."""

LOOKAHEAD_BYTES = 8 << 20
"""How far a sender may run ahead of the reader of one stream."""

TOKEN_KEY = "flp-token"  # noqa: S105 - the name of a metadata key

Options = list[tuple[str, int | str]]

_COMMON: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.experimental.tcp_max_read_chunk_size", 4 << 20),
    ("grpc.http2.max_frame_size", 16777215),
    ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.write_buffer_size", 8 << 20),
    ("grpc.optimization_target", "throughput"),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]


def server_options(max_connection_age_s: float) -> Options:
    """Return the options of a server; connections older than the age are asked to reconnect.

    A live connection outlives its certificate: the age bounds for how long.
    """
    age_ms = int(max_connection_age_s * 1000)
    return [
        *_COMMON,
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_age_ms", age_ms),
        ("grpc.max_connection_age_grace_ms", 120_000),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_concurrent_streams", 100),
        ("grpc.so_reuseport", 0),
    ]


def server_credentials(
    key_pem: bytes, chain_pem: bytes, trusted_pem: bytes
) -> grpc.ServerCredentials:
    """Return credentials that demand a client certificate issued by `trusted_pem`."""
    return grpc.ssl_server_credentials(
        [(key_pem, chain_pem)], root_certificates=trusted_pem, require_client_auth=True
    )


def open_channel(
    address: str,
    *,
    key_pem: bytes,
    chain_pem: bytes,
    trusted_pem: bytes,
    extra: Sequence[tuple[str, int | str]] = (),
) -> aio.Channel:
    """Open an mTLS channel to `host:port`, trusting only the server issuer.

    The host must be one of the names in the server's certificate.
    """
    credentials = grpc.ssl_channel_credentials(trusted_pem, key_pem, chain_pem)
    options: Options = [
        *_COMMON,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 10_000),  # the longest that one handshake may take
        ("grpc.max_reconnect_backoff_ms", 5_000),
        *extra,
    ]
    return aio.secure_channel(address, credentials, options=options)
