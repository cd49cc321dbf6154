"""Real servers and channels on loopback: errors become status, sessions follow replicas that come and go."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1 import inference_pb2, inference_pb2_grpc
from services.common.channel import Outbox, ReplicaSessions, dial, reachable, resolve
from services.common.errors import InvalidRequest, Overloaded
from services.common.serve import GrpcServer, Registration


class Inference(inference_pb2_grpc.InferenceServicer):
    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        raise Overloaded("The queue is full.")

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        raise RuntimeError("a bug with a secret in it")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateDelta]:
        yield inference_pb2.GenerateDelta(text="first")
        raise InvalidRequest("max_tokens must be at least 1.", field="max_tokens")


def server() -> GrpcServer:
    name = "headrace.v1.Inference"
    return GrpcServer([Registration(inference_pb2_grpc.add_InferenceServicer_to_server, Inference(), name)])


@pytest.fixture
async def address() -> AsyncIterator[str]:
    running = server()
    port = await running.start("127.0.0.1:0")
    yield f"127.0.0.1:{port}"
    await running.stop(0)


async def test_errors_become_status(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with dial(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as overloaded:
            await stub.ListModels(inference_pb2.ListModelsRequest())
        assert overloaded.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert overloaded.value.details() == "The queue is full."

        received = []
        with pytest.raises(grpc.aio.AioRpcError) as invalid:
            async for delta in stub.Generate(inference_pb2.GenerateRequest()):
                received.append(delta.text)
        assert received == ["first"]
        assert invalid.value.code() == grpc.StatusCode.INVALID_ARGUMENT

        with pytest.raises(grpc.aio.AioRpcError) as bug:
            await stub.Tokenize(inference_pb2.TokenizeRequest(), metadata=(("x-request-id", "r-17"),))
        assert bug.value.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in (bug.value.details() or "")
        assert "request r-17" in caplog.text


async def test_health_follows_readiness() -> None:
    running = server()
    port = await running.start("127.0.0.1:0")
    async with dial(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="headrace.v1.Inference")
        assert (await check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await running.set_serving(True)
        assert (await check(request)).status == health_pb2.HealthCheckResponse.SERVING
    await running.stop(0)


async def test_a_taken_port_is_an_os_error(address: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {address}"):
        await server().start(address)


async def test_resolve_gives_ipv4_alone_and_skips_unknown_names() -> None:
    assert await resolve(["localhost:1", "127.0.0.1:2", "no-such-host.invalid:3"]) == {"127.0.0.1:1", "127.0.0.1:2"}


async def test_a_server_on_all_interfaces_is_reached_by_this_machines_address() -> None:
    assert await reachable("127.0.0.1", 7) == "127.0.0.1:7"
    address = await reachable("0.0.0.0", 7)
    assert address.endswith(":7") and not address.startswith("0.0.0.0")


async def test_sessions_start_again_when_the_replica_returns() -> None:
    """The replica is stopped and started again on its port; the session comes back by itself."""
    connected: asyncio.Queue[str] = asyncio.Queue()

    async def session(address: str, channel: grpc.aio.Channel) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        async for _status in health.Watch(health_pb2.HealthCheckRequest()):
            connected.put_nowait(address)

    first = server()
    port = await first.start("127.0.0.1:0")
    keeper = asyncio.create_task(ReplicaSessions("test", [f"127.0.0.1:{port}"], session).run())
    assert await connected.get() == f"127.0.0.1:{port}"
    await first.stop(0)
    second = server()
    await second.start(f"127.0.0.1:{port}")
    assert await connected.get() == f"127.0.0.1:{port}"
    keeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeper
    await second.stop(0)


async def test_outbox_delivers_in_order_and_ends() -> None:
    outbox: Outbox[int] = Outbox()
    for number in range(3):
        outbox.put(number)
    outbox.close()
    assert [number async for number in outbox] == [0, 1, 2]
