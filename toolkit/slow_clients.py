"""Clients that hold a gateway up, from a process of their own: slow readers, and connections that ask next to nothing.

`python -m toolkit.slow_clients JSON` (a `SlowClients`) prints `begun` when every reader has the first bytes of its
answer, and goes on until its standard input ends; then `held` if all of them still read, or are still connected. A
reader takes some kilobytes a second and an idle connection asks once a minute, so that none is cut off.
"""

import asyncio
import json
import resource
import socket
import sys
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvloop

from toolkit.chat_load import LAST_CHUNK, ChatLoad, ChatsFailed, chat_request

_RECEIVE_BUFFER_BYTES = 4096
_READ_EVERY_S = 1.0
_ASK_EVERY_S = 60.0  # within the time for which a gateway keeps a connection that asks nothing
# Answers that may be awaited: a crowd that comes at once to an idle server is turned away.
_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class SlowClients:
    """Who is to be slow. The readers' answers must be longer than all buffers between them and the gateway."""

    url: str
    model: str
    key: str
    readers: int
    idle: int
    tokens: int

    @property
    def chats(self) -> ChatLoad:
        return ChatLoad(self.url, self.model, self.key, self.readers, self.tokens, 0, 0)


class SlowReader(asyncio.Protocol):
    """Reads what its small buffer holds, once a second."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held = True  # it has more to read
        self._tail = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.begun.done():
            if data.startswith(b"HTTP/1.1 200"):
                self.begun.set_result(None)
            else:
                self.begun.set_exception(ChatsFailed(data.decode(errors="replace")[:500]))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        self.held = self.held and self._tail != LAST_CHUNK
        self._transport.pause_reading()
        asyncio.get_running_loop().call_later(_READ_EVERY_S, self._transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        self.held = False
        if not self.begun.done():
            self.begun.set_exception(ChatsFailed(f"the server hung up: {exc}"))


class IdleClient(asyncio.Protocol):
    """Asks whether the server lives, and that seldom."""

    held = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.held = False

    def _ask(self) -> None:
        if self.held:
            self._transport.write(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            asyncio.get_running_loop().call_later(_ASK_EVERY_S, self._ask)


async def run(clients: SlowClients) -> None:
    """Raises ChatsFailed, OSError."""
    loop = asyncio.get_running_loop()
    idle: list[IdleClient] = []
    for _ in range(clients.idle):
        _, client = await loop.create_connection(IdleClient, sock=await _connect(clients.url))
        idle.append(client)
    readers: list[SlowReader] = []
    for number in range(clients.readers):
        transport, reader = await loop.create_connection(SlowReader, sock=await _connect(clients.url))
        transport.write(chat_request(clients.chats, number))
        readers.append(reader)
        if len(readers) % _AT_ONCE == 0:
            await asyncio.gather(*(reader.begun for reader in readers))
    await asyncio.gather(*(reader.begun for reader in readers))
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    ended, closed = (sum(not client.held for client in kind) for kind in (readers, idle))
    if ended or closed:
        raise ChatsFailed(f"{ended} readers had their whole answers, and {closed} idle connections were closed")
    print("held", flush=True)


async def _connect(url: str) -> socket.socket:
    where = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (where.hostname, where.port))
    return connection


def main(argument: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        uvloop.run(run(SlowClients(**json.loads(argument))))
    except (ChatsFailed, OSError) as error:
        sys.exit(f"slow clients: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
