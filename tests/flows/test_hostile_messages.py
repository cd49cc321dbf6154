"""Made-up, cut-off and random messages to every method of every gRPC service, which goes on serving."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from headrace.v1 import cache_pb2, inference_pb2, scheduler_pb2, worker_pb2
from services.common.channel import dial
from tests.flows.headrace_up import HeadraceUp, eventually
from tests.flows.keyed_stack import MODEL
from tests.messages import hostile_bytes
from toolkit.health import grpc_health

CALLS = 120
AT_ONCE = 16
# A stream that nothing is wrong with stays open; its caller goes away.
PATIENCE_S = 1.0
SERVERS: Mapping[str, FileDescriptor] = {
    "gateway": inference_pb2.DESCRIPTOR,
    "scheduler": scheduler_pb2.DESCRIPTOR,
    "cache": cache_pb2.DESCRIPTOR,
    "worker": worker_pb2.DESCRIPTOR,
}
# What each serves beside its own.
COMMON = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def call(channel: grpc.aio.Channel, method: MethodDescriptor, draw: random.Random) -> grpc.StatusCode | None:
    """The status that a call of up to three messages ended with; None: it did not end."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    contents = [hostile_bytes(method.input_type, draw) for _ in range(draw.randint(1, 3))]

    async def several() -> AsyncIterator[bytes]:
        for content in contents:
            yield content

    call_of = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    running = call_of(path)(several() if method.client_streaming else contents[0])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            code: grpc.StatusCode = await running.code()
            return code
    running.cancel()
    return None


async def hammer(address: str, method: MethodDescriptor) -> list[grpc.StatusCode | None]:
    draw, room = random.Random(method.name), asyncio.Semaphore(AT_ONCE)

    async def one(channel: grpc.aio.Channel) -> grpc.StatusCode | None:
        async with room:
            return await call(channel, method, draw)

    async with dial(address) as channel:
        return await asyncio.gather(*(one(channel) for _ in range(CALLS)))


def served(address: str) -> Sequence[MethodDescriptor]:
    """Every method of every service that a server says it has."""
    with grpc.insecure_channel(address) as channel:
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
    return [method for name in names for method in Default().FindServiceByName(name).methods]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> HeadraceUp:
    return HeadraceUp(tmp_path_factory.mktemp("hostile"), "--engine", "echo")


@pytest.mark.timeout(300)
async def test_every_service_goes_on(echo: HeadraceUp) -> None:
    try:
        await asyncio.to_thread(echo.wait_ready)
        pids = {name: echo.pid_of(name) for name in SERVERS}
        for name, file in SERVERS.items():
            methods = await asyncio.to_thread(served, echo.member(name).address)
            own = {service.full_name for service in file.services_by_name.values()}
            assert {method.containing_service.full_name for method in methods} == COMMON | own
            for method in methods:
                codes = await hammer(echo.member(name).address, method)
                assert grpc.StatusCode.UNAVAILABLE not in codes, method.full_name
        assert {name: echo.pid_of(name) for name in SERVERS} == pids, "none was started again"
        for name in SERVERS:
            assert await grpc_health(dial(echo.member(name).address)) == "serving"
            log = Path(echo.state.directory) / f"{name}.log"
            assert "Traceback" not in log.read_text(errors="replace"), "a caller's mistake is no failure of a service"
        await asyncio.to_thread(eventually, lambda: _completes(echo), "a request is answered")
    finally:
        echo.kill()


def _completes(stack: HeadraceUp) -> bool:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 3}
    return httpx.post(f"{stack.http_url}/v1/completions", json=body, timeout=60).status_code == 200
