"""Asks running processes whether they are ready: gRPC health, the gateway's HTTP readiness, a Redis PING."""

import asyncio
import contextlib

import grpc
import grpc.aio
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 2.0


async def grpc_health(channel: grpc.aio.Channel) -> str:
    """The server's own word of grpc.health.v1 (`serving`, `not serving`), or `unreachable`. Closes the channel."""
    request = health_pb2.HealthCheckRequest()
    async with channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            reply = await check(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return "unreachable"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status).lower().replace("_", " ")


async def grpc_serves(channel: grpc.aio.Channel) -> bool:
    """True if grpc.health.v1 says SERVING. Closes the channel."""
    return await grpc_health(channel) == "serving"


async def http_ready(url: str) -> bool:
    """True if the address answers 200."""
    return await _http_status(url) == httpx.codes.OK


async def http_needs_key(url: str) -> bool:
    """True if the address refuses whoever has no API key."""
    return await _http_status(url) == httpx.codes.UNAUTHORIZED


async def _http_status(url: str) -> int | None:
    """None without an answer."""
    # Reading the certificates of all authorities takes longer than the rest of it, and nothing secret is said to the
    # stacks of our own that are asked here.
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, verify=False) as client:
        try:
            return (await client.get(url)).status_code
        except httpx.HTTPError:
            return None


async def redis_answers(host: str, port: int) -> bool:
    """True if PING is answered: not while Redis still reads its files."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            with contextlib.closing(writer):
                writer.write(b"PING\r\n")
                return await reader.readline() == b"+PONG\r\n"
    return False
