"""Clients that leave their answers unread: a connection ends when nothing of what waits is taken between two looks."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from services.gateway.http.exchange import Receive, Scope, Send
from services.gateway.http.protocol import HttpLimits
from services.gateway.http.server import HttpServer
from tests.services.gateway.looks import WRITE_TIMEOUT_S, Looks
from tests.services.gateway.stack import eventually

BUFFER_BYTES = 4096


async def page(scope: Scope, _receive: Receive, send: Send) -> None:
    """A page of as many bytes as its path says."""
    size = int(scope["path"].strip("/"))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": b"x" * size})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """Of a server whose kernel takes little of what its clients do not read."""
    create_server = socket.create_server

    def with_small_buffers(*args: object, **options: object) -> socket.socket:
        listener = create_server(*args, **options)  # type: ignore[arg-type]
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        return listener

    monkeypatch.setattr(socket, "create_server", with_small_buffers)
    limits = HttpLimits(
        connections=10,
        headers=100,
        head_bytes=32_768,
        head_timeout_s=60.0,
        framing_bytes=32_768,
        keep_alive_s=60.0,
        write_timeout_s=WRITE_TIMEOUT_S,
    )
    server = HttpServer(page, "127.0.0.1", 0, limits)
    yield await server.start()
    await server.stop()


@contextlib.asynccontextmanager
async def asking(port: int, request: bytes) -> AsyncIterator[socket.socket]:
    """A client that has asked and reads nothing."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, request)
        yield client


async def read(client: socket.socket, size: int) -> int:
    """Reads so many bytes of pages, or all there are before the end, and some more."""
    done = 0
    with contextlib.suppress(ConnectionResetError):
        while done < size and (part := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 4096), 10)):
            done += part.count(b"x")
    return done


def get(size: int, *headers: bytes) -> bytes:
    return b"\r\n".join([b"GET /%d HTTP/1.1" % size, b"host: x", *headers, b"", b""])


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(get(1_000_000) * 20, id="more than the server buffers"),
        pytest.param(get(40_000), id="less than that, and the connection would be kept"),
        pytest.param(get(40_000, b"connection: close"), id="less than that, and the connection is closed"),
    ],
)
async def test_a_client_that_takes_nothing_is_cut(
    port: int, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes
) -> None:
    looks = Looks(monkeypatch)
    async with asking(port, request_bytes) as client:
        await eventually(looks.were_enough)  # the kernels' buffers may take something after the first look
        assert await read(client, 1_000_000) < 40_000


async def test_a_client_that_reads_slowly_is_not_cut(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    async with asking(port, get(1_000_000)) as client:
        got = 0
        while got < 800_000:
            look = await looks.next()
            got += await read(client, 16_384)
            look()
        assert got + await read(client, 1_000_000 - got) == 1_000_000


async def test_nobody_looks_at_a_client_that_has_read_all(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    async with asking(port, get(200_000)) as client:
        for _ in range(2):
            look = await looks.next()
            assert await read(client, 200_000) == 200_000
            look()
            assert looks.none_is_due
            await asyncio.get_running_loop().sock_sendall(client, get(200_000))
