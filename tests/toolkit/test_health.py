"""Health as the services themselves tell it, from a real gRPC server and from nobody."""

import asyncio

import pytest

from services.common.channel import dial
from services.common.serve import GrpcServer
from tests.redis_server import free_port
from toolkit.health import grpc_health, grpc_serves, http_needs_key, http_ready


async def test_grpc_health_follows_the_server() -> None:
    server = GrpcServer([])
    port = await server.start("127.0.0.1:0")
    address = f"127.0.0.1:{port}"
    assert await grpc_health(dial(address)) == "not serving"
    assert not await grpc_serves(dial(address))
    await server.set_serving(True)
    assert await grpc_health(dial(address)) == "serving"
    assert await grpc_serves(dial(address))
    await server.stop(0)
    assert await grpc_health(dial(address)) == "unreachable"


async def test_nobody_there_is_not_ready() -> None:
    assert not await http_ready(f"http://127.0.0.1:{free_port()}/health/ready")
    assert not await http_needs_key(f"http://127.0.0.1:{free_port()}/v1/models")


@pytest.mark.parametrize("status", [200, 401, 503])
async def test_a_key_is_needed_where_one_is_asked_for(status: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n".encode())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/models"
        assert (await http_ready(url), await http_needs_key(url)) == (status == 200, status == 401)
