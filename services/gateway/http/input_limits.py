"""What one client may send and open, in the terms of the two servers. `config.py` says why each is what it is."""

from services.gateway.config import GatewaySettings
from services.gateway.http.protocol import HttpLimits


def http_limits(settings: GatewaySettings) -> HttpLimits:
    return HttpLimits(
        connections=settings.max_connections,
        headers=settings.max_headers,
        head_bytes=settings.max_head_bytes,
        head_timeout_s=settings.head_timeout_s,
        framing_bytes=settings.max_body_bytes,
        keep_alive_s=settings.keep_alive_s,
        write_timeout_s=settings.write_timeout_s,
    )


def grpc_limits(settings: GatewaySettings) -> tuple[tuple[str, int], ...]:
    """Options of the gRPC server."""
    return (
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive_s * 1000)),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.max_metadata_size", settings.max_head_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_head_bytes),
        ("grpc.server_handshake_timeout_ms", round(settings.head_timeout_s * 1000)),
    )
