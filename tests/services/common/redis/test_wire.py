"""The connection itself, against a server that answers as the test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from services.common.redis.client import connect
from services.common.redis.wire import Wire

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def wire_to(answer: Answer) -> AsyncIterator[Wire]:
    """A wire to a server that lets it log in, then does as `answer` says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            greeting = await reader.readline()
            if not greeting.startswith(b"*"):
                return  # hung up
            parts = [(await reader.readline(), await reader.readline())[1] for _ in range(int(greeting[1:]))]
            if parts[0] == b"GO\r\n":
                break
            writer.write(b"+OK\r\n")
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    redis = connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    wire = await Wire.connect(redis, 5.0)
    try:
        yield wire
    finally:
        await wire.close()
        await redis.aclose()
        server.close()


async def replies_to(wire: Wire, count: int, timeout_s: float = 5.0) -> Sequence[Any]:
    outcome: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
    wire.exchange(b"*1\r\n$2\r\nGO\r\n", count, timeout_s, outcome.set_result)
    return await asyncio.wait_for(outcome, 10)


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_replies_come_together_however_they_are_cut() -> None:
    async with wire_to(silent) as wire:
        coming = asyncio.create_task(replies_to(wire, 6))
        await asyncio.sleep(0)
        text = b":1\r\n*2\r\n$3\r\na\r\n\r\n$-1\r\n-ERR no\r\n-NOSCRIPT none\r\n-READONLY no\r\n-LOADING it\r\n"
        for byte in text:
            assert not coming.done()
            wire.data_received(bytes([byte]))
        number, both, *errors = await coming
        assert wire.open
    assert (number, both) == (1, [b"a\r\n", None])
    assert [type(error) for error in errors] == [ResponseError, NoScriptError, ReadOnlyError, BusyLoadingError]


async def test_of_a_connection_that_ends_meanwhile_what_has_not_come_is_the_reason() -> None:
    async def half(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b":1\r\n:2\r\n$5\r\nab")

    async with wire_to(half) as wire:
        one, two, *rest = await replies_to(wire, 4)
        assert not wire.open
    assert (one, two) == (1, 2)
    assert [type(error) for error in rest] == [ConnectionError] * 2


async def test_a_server_that_is_silent_is_given_up() -> None:
    async with wire_to(silent) as wire:
        (error,) = await replies_to(wire, 1, timeout_s=0.05)
        assert not wire.open
    assert isinstance(error, TimeoutError)


async def test_what_is_no_reply_ends_the_connection() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b":1\r\nHTTP/1.1 400\r\n\r\n")
        await silent(reader, writer)

    async with wire_to(nonsense) as wire:
        one, error = await replies_to(wire, 2)
        assert not wire.open
    assert one == 1
    assert isinstance(error, InvalidResponse)


async def test_more_replies_than_commands_end_the_connection() -> None:
    async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b":1\r\n:2\r\n")
        await silent(reader, writer)

    async with wire_to(chatty) as wire:
        assert await replies_to(wire, 1) == [1]
        assert not wire.open


async def test_a_write_that_fails_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(asyncio.Transport):
        aborted = False

        def is_closing(self) -> bool:
            return self.aborted

        def write(self, data: object) -> None:
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

        def abort(self) -> None:
            self.aborted = True

    async with wire_to(silent) as wire:
        with monkeypatch.context() as patched:
            patched.setattr(wire, "_transport", Closed())
            (error,) = await replies_to(wire, 1)
            assert not wire.open
    assert isinstance(error, ConnectionError)


async def test_one_that_has_ended_says_so_at_once() -> None:
    async with wire_to(silent) as wire:
        wire.abort()
        (error,) = await replies_to(wire, 1)
    assert isinstance(error, ConnectionError)


async def test_a_server_that_does_not_let_one_in_is_given_up() -> None:
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    redis = connect(f"redis://:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        await Wire.connect(redis, 0.2)
    await redis.aclose()
    server.close()
