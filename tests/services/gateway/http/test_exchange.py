"""Clients that stop reading: nothing waits for them for ever."""

import asyncio
from collections.abc import Callable

import pytest

from services.common.errors import Unavailable
from services.gateway.http.exchange import CONNECTION, ClientGone, HttpExchange, Message


async def never() -> Message:
    return await asyncio.get_running_loop().create_future()


class FullConnection:
    """Takes a number of messages, and then none."""

    on_lost: Callable[[], None] | None = None
    lost = False

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken: list[Message] = []
        self.full = asyncio.Event()

    @property
    def open(self) -> bool:
        return 0 < len(self.taken) < self.room

    def write(self, part: bytes) -> None:
        assert self.open
        self.taken.append({"body": part})
        if not self.open:
            self.full.set()

    async def send(self, message: Message) -> None:
        if len(self.taken) == self.room:
            await never()
        self.taken.append(message)


def exchange_over(connection: FullConnection, *, comment_every_s: float = 60.0) -> HttpExchange:
    scope = {"headers": [], "method": "POST", CONNECTION: connection}
    return HttpExchange(scope, never, connection.send, comment_every_s=comment_every_s, write_timeout_s=0.05)


@pytest.mark.parametrize("room", [0, 1, 2])
async def test_a_client_that_does_not_read_is_gone(room: int) -> None:
    exchange = exchange_over(FullConnection(room))

    async def send_events() -> None:
        while True:
            await exchange.send_event(b"data: x\n\n")

    with pytest.raises(ClientGone):
        await asyncio.wait_for(exchange.while_connected(send_events()), 10)


async def test_a_comment_that_is_not_read_ends_the_request_too() -> None:
    exchange = exchange_over(FullConnection(2), comment_every_s=0.02)

    async def send_one_event() -> None:
        await exchange.send_event(b"data: x\n\n")
        await never()

    with pytest.raises(ClientGone):
        await asyncio.wait_for(exchange.while_connected(send_one_event()), 10)


async def test_an_error_that_is_not_read_is_let_go() -> None:
    await asyncio.wait_for(exchange_over(FullConnection(0)).fail(Unavailable("gone")), 10)


async def test_a_silent_stream_has_comments() -> None:
    connection = FullConnection(5)
    exchange = exchange_over(connection, comment_every_s=0.01)

    async def send_one_event() -> None:
        await exchange.send_event(b"data: x\n\n")
        await connection.full.wait()

    await asyncio.wait_for(exchange.while_connected(send_one_event()), 10)
    assert [message.get("body") for message in connection.taken[1:]] == [b"data: x\n\n", *[b": waiting\n\n"] * 3]


async def test_a_client_that_left_before_the_work_began_is_gone() -> None:
    connection = FullConnection(9)
    connection.lost = True
    with pytest.raises(ClientGone):
        await asyncio.wait_for(exchange_over(connection).while_connected(never_ends()), 10)


async def test_a_client_that_leaves_is_gone() -> None:
    connection = FullConnection(9)

    async def leave() -> None:
        assert connection.on_lost is not None
        connection.on_lost()
        await never()

    with pytest.raises(ClientGone):
        await asyncio.wait_for(exchange_over(connection).while_connected(leave()), 10)
    assert connection.on_lost is None


async def never_ends() -> None:
    await never()
