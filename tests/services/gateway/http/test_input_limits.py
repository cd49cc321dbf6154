"""Clients that send too much, too slowly, or open too many connections and streams: they are cut, others are served."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.v1.inference_pb2 import GenerateRequest, ListModelsRequest
from services.common.channel import dial_front
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack, eventually, running_stack
from tests.services.gateway.test_main import start, until_logged
from toolkit.health import grpc_health

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
IDLE = 2000


@contextlib.asynccontextmanager
async def connections(address: str, count: int) -> AsyncIterator[list[Connection]]:
    host, _, port = address.rpartition(":")
    opened: list[Connection] = []
    try:
        for _ in range(count):
            opened.append(await asyncio.open_connection(host, int(port)))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """All that was sent before the end."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(20):
            while part := await reader.read(65536):
                received += part
    return received


def http_address(stack: Stack) -> str:
    return urlsplit(stack.base_url).netloc


@pytest.mark.parametrize(("size", "ended"), [(40_000, True), (300_000, True), (300_000, False)])
async def test_a_head_that_is_too_long_is_refused(stack: Stack, size: int, ended: bool) -> None:
    async with connections(http_address(stack), 1) as [(reader, writer)]:
        head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * size + (b"\r\n\r\n" if ended else b"")
        writer.write(head)
        answer = await until_closed(reader)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"type":"invalid_request_error"' in answer


async def test_too_many_headers_are_refused(stack: Stack) -> None:
    for path in ("/v1/models", "/v1/completions"):
        refused = await stack.http.get(path, headers=[(f"x-{number}", "") for number in range(101)])
        assert (refused.status_code, refused.headers["connection"]) == (431, "close")
        assert refused.json()["error"]["message"] == "A request may have 100 headers, and 32768 bytes of them."


async def test_trailers_without_end_are_cut(redis_url: str) -> None:
    async with running_stack(redis_url, max_body_bytes=1024, read_timeout_s=600) as stack:
        async with connections(http_address(stack), 1) as [(reader, writer)]:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ")
            with contextlib.suppress(ConnectionError):
                while not writer.transport.is_closing():
                    writer.write(b"a" * 65536)
                    await writer.drain()
            await until_closed(reader)


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: "])
async def test_a_connection_that_sends_no_whole_head_is_closed(redis_url: str, sent: bytes) -> None:
    async with running_stack(redis_url, head_timeout_s=0.1) as stack:
        async with connections(http_address(stack), 1) as [(reader, writer)]:
            writer.write(sent)
            assert await until_closed(reader) == b""
        assert (await stack.complete()).status_code == 200


async def test_idle_connections_make_room_for_others(redis_url: str) -> None:
    async with running_stack(redis_url, max_connections=10) as stack:
        async with connections(http_address(stack), 50) as opened:
            async with httpx.AsyncClient(base_url=stack.base_url) as another:
                assert (await another.get("/v1/models")).status_code == 200
            ends = [await until_closed(reader) for reader, _ in opened[:40]]
            assert ends == [b""] * 40
            opened[-1][1].write(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert b'"live"' in await until_closed(opened[-1][0])


async def test_a_connection_with_a_request_under_way_is_not_idle(redis_url: str) -> None:
    async with running_stack(redis_url, max_connections=10) as stack:
        body = b'{"model": "%s", "prompt": "hello", "max_tokens": 100}' % MODEL.encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        async with connections(http_address(stack), 1) as [(reader, writer)]:
            writer.write(head)
            assert (await stack.http.get("/health/live")).status_code == 200  # the head has been read by then
            async with connections(http_address(stack), 50):
                assert (await stack.http.get("/health/live")).status_code == 200
                writer.write(body)
                assert (await until_closed(reader)).startswith(b"HTTP/1.1 200 ")


async def test_clients_that_read_nothing_are_cut_and_others_are_served(redis_url: str) -> None:
    asked = 200
    async with running_stack(redis_url, max_connections=3, write_timeout_s=0.1) as stack:
        size = len((await stack.http.get("/openapi.json")).content)
        async with connections(http_address(stack), 3) as opened, httpx.AsyncClient(base_url=stack.base_url) as another:
            for _, writer in opened:
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
                await writer.drain()

            async def served() -> bool:
                with contextlib.suppress(httpx.TransportError):  # until there is room
                    return (await another.get("/v1/models")).status_code == 200
                return False

            await eventually(served)
            for reader, writer in opened:
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                assert len(await until_closed(reader)) < asked * size


async def test_streams_beyond_a_connections_share_wait_and_others_are_served(redis_url: str) -> None:
    async with running_stack(redis_url, max_streams_per_connection=8) as stack:
        async with dial_front(stack.grpc_address, None) as greedy:
            watch = health_pb2_grpc.HealthStub(greedy).Watch
            calls = [watch(health_pb2.HealthCheckRequest()) for _ in range(IDLE)]
            answered = asyncio.Semaphore(0)

            async def first(call: grpc.aio.UnaryStreamCall[object, object]) -> None:
                await call.read()
                answered.release()

            reading = [asyncio.create_task(first(call)) for call in calls]
            for _ in range(8):
                await asyncio.wait_for(answered.acquire(), 10)
            models = await stack.inference.ListModels(ListModelsRequest(), timeout=10)
            assert [model.name for model in models.models] == [MODEL]
            assert sum(task.done() for task in reading) == 8
            for call in calls:
                call.cancel()
            await asyncio.gather(*reading, return_exceptions=True)


async def test_metadata_that_is_too_long_is_refused(stack: Stack) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stack.inference.ListModels(ListModelsRequest(), metadata=(("x-long", "a" * 100_000),))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_is_no_longer_than_a_body(stack: Stack) -> None:
    codes = {4_100_000: grpc.StatusCode.INVALID_ARGUMENT, 4_300_000: grpc.StatusCode.RESOURCE_EXHAUSTED}
    for length, code in codes.items():
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(stack.inference.Generate(GenerateRequest(model=MODEL, text="a" * length))))
        assert refused.value.code() == code, refused.value.details()


async def test_thousands_of_idle_connections_keep_nobody_out(redis_url: str) -> None:
    process = await start(redis_url, max_connections=IDLE + 100)
    ports = re.search(r"ready on \S+:(\d+) \(HTTP\) and \S+:(\d+) \(gRPC\)", await until_logged(process, "(gRPC)"))
    assert ports is not None
    http, front = (f"127.0.0.1:{port}" for port in ports.groups())
    async with connections(http, IDLE), connections(front, IDLE), httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"http://{http}/health/live")).status_code == 200
        assert await grpc_health(dial_front(front, None)) == "not serving"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 15) == 0


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("size", [1_000, 100_000, 400_000])
async def test_a_client_that_leaves_ends_its_request_however_long_its_body_was(
    stack: Stack, size: int, pipelined: bool
) -> None:
    [worker] = stack.workers
    worker.pause_after = 1
    body = b'{"model": "%b", "prompt": "hello", "max_tokens": 100, "user": "%b"}' % (MODEL.encode(), b"u" * size)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with connections(http_address(stack), 1) as [(_, writer)]:
        writer.write(head)
        await writer.drain()
        await asyncio.sleep(0.01)  # the body comes in a packet of its own
        writer.write(body)
        await writer.drain()
        await asyncio.wait_for(worker.started.wait(), 20)
        if pipelined:
            writer.write(head + body[:10])
            await writer.drain()
    if not pipelined:
        await asyncio.wait_for(worker.cancelled.wait(), 20)
    worker.let_go()
    await stack.settled()
