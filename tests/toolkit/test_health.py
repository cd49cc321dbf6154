"""Health as the services themselves tell it, from a real gRPC server and from nobody."""

from services.common.channel import dial
from services.common.serve import GrpcServer
from tests.redis_server import free_port
from toolkit.health import grpc_health, grpc_serves, http_ready


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
