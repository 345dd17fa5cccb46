"""A gRPC server as peers and the relay have it: mutual TLS, a guard before every method, limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc import aio

from plait.peers.codec import PIECE_BYTES
from plait.peers.credentials import Pair
from plait.peers.guard import (
    HANDSHAKE_S,
    IDLE_S,
    OPEN_CALLS,
    TUNNELS,
    Guard,
    Names,
    most_connections,
)

Options = list[tuple[str, int | str]]
Credentials = tuple[bytes, Pair] | None
"""The authority's certificate and one's own pair; None without TLS."""

Method = Callable[[Any, Any], Awaitable[None]]
"""(stream, context) -> nothing: it reads from the context and writes to it."""

OPTIONS: Options = [
    ("grpc.max_receive_message_length", PIECE_BYTES),
    ("grpc.max_send_message_length", PIECE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two peers on a port would share its calls at random.
    ("grpc.so_reuseport", 0),
    # HTTP/2's frames and window are made for web pages.
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    # A neighbour that comes back is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
"""Of both sides."""


async def serve(
    listen: str,
    credentials: Credentials,
    guard: Guard,
    methods: Mapping[str, Method],
    num_members: int,
) -> aio.Server:
    """Listen.

    To a server each method is a stream, whatever it is to its caller: so that writing has a time
    limit too, and there is no other method, such as the health service's Watch.

    Args:
        listen: `host:port`.
        credentials: For mutual TLS.
        guard: In front of all methods.
        methods: `/service/name` -> who handles it.
        num_members: How many may call.

    Raises:
        ValueError: The address is in use, or not of this machine.
    """
    server = aio.server(
        options=[*OPTIONS, *server_options()],
        interceptors=[guard],
        maximum_concurrent_rpcs=2 * (OPEN_CALLS + TUNNELS) * num_members,
    )
    for path, method in methods.items():
        service, name = path.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(method)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {name: handler}),)
        )
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            authority, own = credentials
            secret = grpc.ssl_server_credentials(
                [(own.key, own.certificate)], authority, require_client_auth=True
            )
            port = server.add_secure_port(listen, secret)
    except RuntimeError as error:
        raise ValueError(
            f"Can't listen on {listen}: {error}. Stop what uses it, or change `listen` in "
            "peer.toml."
        ) from error
    assert port
    await server.start()
    return server


def server_options() -> Options:
    """What a server grants to connections, of whoever opens them."""
    return [
        ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_S)),
        ("grpc.max_connection_idle_ms", int(1000 * IDLE_S)),
        ("grpc.max_allowed_incoming_connections", most_connections()),
        ("grpc.max_concurrent_streams", 64),
    ]


def certified(context: Any, secure: bool) -> Names:
    """The names in the certificate of whoever calls; None without TLS."""
    if not secure:
        return None
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return frozenset(name.decode(errors="replace") for name in names)
