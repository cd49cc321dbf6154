"""uvicorn's HTTP protocol with bounds on what a connection may send and leave unread, and on how many there are.

uvicorn bounds neither the head of a request, in bytes or in time, nor a connection that never sends one, nor the time
that an answer waits for its client to read it. While a pipelined request waits for the one before it, nothing is read,
and so the client's end is not seen.
"""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.gateway.errors import HeadTooLarge
from services.gateway.http.exchange import CONNECTION, Header, Receive, Scope, Send
from services.gateway.http.openai_errors import error_body, error_headers


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Of one server. The settings of the gateway say why they are what they are."""

    connections: int
    headers: int
    head_bytes: int
    # A request line and headers take at most so long, from the connection's first moment or the request's first byte.
    head_timeout_s: float
    # What is neither head nor body: sizes of chunks, and trailers.
    framing_bytes: int
    keep_alive_s: float
    # A client that takes nothing for so long of what waits for it is cut.
    write_timeout_s: float


# Where Linux's `struct tcp_info` has `tcpi_bytes_acked`, an unsigned 64-bit number.
_BYTES_ACKED_AT = 120


class LimitedConfig(uvicorn.Config):
    """uvicorn's configuration, with what the protocols of one server share."""

    def __init__(self, app: Any, limits: HttpLimits, **options: Any) -> None:
        super().__init__(app, http=LimitedProtocol, timeout_keep_alive=int(limits.keep_alive_s), **options)
        self.limits = limits
        # Connections without a request under way, the one that is so for longest first.
        self.idle: MutableMapping[LimitedProtocol, None] = {}


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    config: LimitedConfig

    def __init__(self, config: LimitedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._limits = config.limits
        self._idle = config.idle
        self._in_head = True
        self._counted_bytes = 0  # of the message so far, but for its body; what begins it may be left out
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        # Of the requests that are not answered, in order.
        self._requests: deque[_RequestConnection] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._make_room()
        self._idle[self] = None
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._stop_head_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)
        for request in self._requests:
            request.lose()

    def data_received(self, data: bytes) -> None:
        self._counted_bytes += len(data)
        super().data_received(data)
        if self in self._idle:
            self._start_head_timer()
        if self._in_head and self._counted_bytes > self._limits.head_bytes:
            self._refuse_head()
        elif self._counted_bytes > self._limits.head_bytes + self._limits.framing_bytes:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._counted_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        self._idle.pop(self, None)
        size = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        if len(self.headers) > self._limits.headers or size > self._limits.head_bytes:
            self.app = self._answer_refusal
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is before:  # a request of another protocol, which is none of this one's
            return
        request = _RequestConnection(self.cycle)
        self._requests.append(request)
        self.scope[CONNECTION] = request  # type: ignore[literal-required]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # a long body has paused it: then the client's end would not be seen

    def on_body(self, body: bytes) -> None:
        self._counted_bytes -= len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        self._requests.popleft()
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._idle[self] = None
        self._watch_writing()

    def _make_room(self) -> None:
        """Closes the connection that has been idle for longest; this one if all others are busy."""
        longest = next(iter(self._idle), self)
        self._idle.pop(longest, None)
        longest.transport.abort()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_timeout_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_writing(self) -> None:
        """Looks now and then, as long as something waits for the client, whether it takes any of it."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._limits.write_timeout_s, self._look, self._taken_bytes())

    def _look(self, taken_before: int) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() and self._taken_bytes() == taken_before:
            self.transport.abort()
        else:
            self._watch_writing()

    def _taken_bytes(self) -> int:
        """What the client's machine has taken so far: the write buffer shrinks by megabytes at a time, or under TLS
        only when all before it is gone, and would make a slow client look like one that does not read.
        """
        connection = self.transport.get_extra_info("socket")
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_AT + 8)
        return int(struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0])

    def _refuse_head(self) -> None:
        """Answers what is no whole request, unless an earlier request's answer is under way."""
        if self in self._idle and not self.transport.is_closing():
            status, headers, body = self._refusal()
            lines = [b"HTTP/1.1 %d Request Header Fields Too Large" % status]
            lines += [b"%s: %s" % header for header in headers]
            self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()

    async def _answer_refusal(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        status, headers, body = self._refusal()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self) -> tuple[int, list[Header], bytes]:
        limits = self._limits
        error = HeadTooLarge(f"A request may have {limits.headers} headers, and {limits.head_bytes} bytes of them.")
        body = error_body(error)
        length = b"%d" % len(body)
        headers = [*error_headers(error), (b"content-length", length), (b"connection", b"close")]
        return error.http_status, headers, body


class _RequestConnection:
    """A connection as one of its requests sees it."""

    __slots__ = ("_cycle", "lost", "on_lost")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self.lost = False
        self.on_lost: Callable[[], None] | None = None

    def lose(self) -> None:
        self.lost = self._cycle.disconnected = True  # uvicorn says so to the newest request alone
        if self.on_lost is not None:
            self.on_lost()

    @property
    def open(self) -> bool:
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and cycle.response_started
            and not (self.lost or cycle.flow.write_paused or cycle.response_complete)
        )

    def write(self, part: bytes) -> None:
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
