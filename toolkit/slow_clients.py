"""Clients that hold a gateway up, from a process of their own: slow readers, and connections that ask nothing.

`python -m toolkit.slow_clients JSON` (a `SlowClients`) prints `begun` when every reader has the first bytes of its
answer, and goes on until its standard input ends. A reader takes some kilobytes a second, so that it is never cut off.
"""

import asyncio
import json
import resource
import socket
import sys
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvloop

from toolkit.chat_load import ChatLoad, ChatsFailed, chat_request

_RECEIVE_BUFFER_BYTES = 4096
_READ_EVERY_S = 1.0
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

    def __init__(self, begun: "asyncio.Future[None]") -> None:
        self._begun = begun

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._begun.done():
            if data.startswith(b"HTTP/1.1 200"):
                self._begun.set_result(None)
            else:
                self._begun.set_exception(ChatsFailed(data.decode(errors="replace")[:500]))
        self._transport.pause_reading()
        asyncio.get_running_loop().call_later(_READ_EVERY_S, self._transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._begun.done():
            self._begun.set_exception(ChatsFailed(f"the server hung up: {exc}"))


async def run(clients: SlowClients) -> None:
    """Raises ChatsFailed, OSError."""
    sockets = [await _connect(clients.url) for _ in range(clients.idle)]
    begun: list[asyncio.Future[None]] = []
    for number in range(clients.readers):
        begun.append(await _begin_reader(clients, number))
        if len(begun) % _AT_ONCE == 0:
            await asyncio.gather(*begun)
    await asyncio.gather(*begun)
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for idle in sockets:
        idle.close()


async def _begin_reader(clients: SlowClients, number: int) -> "asyncio.Future[None]":
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[None] = loop.create_future()
    transport, _ = await loop.create_connection(lambda: SlowReader(begun), sock=await _connect(clients.url))
    transport.write(chat_request(clients.chats, number))
    return begun


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
