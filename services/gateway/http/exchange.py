"""One HTTP request and its answer over raw ASGI. Knows no OpenAI and no models; errors have OpenAI's shape."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from services.common.errors import HeadraceError
from services.gateway import timings
from services.gateway.caller import Caller, internal_id, sane_request_id, timeout_seconds
from services.gateway.errors import BodyTimeout, BodyTooLarge
from services.gateway.http.openai_errors import error_body, error_headers
from services.gateway.http.openai_events import COMMENT, error_event
from services.gateway.keys.account import Account
from services.gateway.keys.limit_answers import rate_limit_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

# Where a scope has its `Connection`.
CONNECTION = "headrace.connection"

CLIENT_GONE_STATUS = 499
_SSE_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


class Connection(Protocol):
    """What the server knows of one request's client; to ask it by way of ASGI costs several times as much."""

    # Called when the client has gone. Nobody is told of a client that went before.
    on_lost: Callable[[], None] | None

    @property
    def lost(self) -> bool:
        """The client has gone."""

    @property
    def open(self) -> bool:
        """The answer has begun, has no length, and the client reads."""

    def write(self, part: bytes) -> None:
        """Sends a part of the answer at once, while it is open."""


class ClientGone(Exception):
    """The client has disconnected, or reads no more: there is nobody to answer."""


class HttpExchange:
    """Reads one request, and answers it with one body or a stream of server-sent events."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, comment_every_s: float, write_timeout_s: float
    ) -> None:
        self._receive = receive
        self._asgi_send = send
        self._connection: Connection = scope[CONNECTION]
        self._comment_every_s = comment_every_s
        self._write_timeout_s = write_timeout_s
        self._arrived = asyncio.get_running_loop().time()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._streaming = False
        self._complete = False
        self._gone = False
        self._task: asyncio.Task[None] | None = None  # that works on the answer
        # Whether the newest message is still on its way into the server's buffer, and since when.
        self._sending = False
        self._sent_at = 0.0
        wanted_id = self.header(b"x-request-id")
        self.request_id = sane_request_id(wanted_id)
        self.internal_id = internal_id(self.request_id, wanted_id)
        # Of the answer, once it has begun.
        self.status = 0
        # Set when it is known who calls; the answer tells how its limits stand.
        self.account = Account()

    @property
    def wants_timings(self) -> bool:
        return timings.are_wanted(self.header(timings.HEADER.encode()))

    def caller(self, default_timeout_s: float) -> Caller:
        timeout_s = timeout_seconds(self.header(b"x-request-timeout-ms"), default_timeout_s)
        traceparent = self.header(b"traceparent") or ""
        account = self.account
        return Caller(self.request_id, self.internal_id, self._arrived, timeout_s, traceparent, account.key_id, account)

    async def read_body(self, limit_bytes: int, timeout_s: float) -> bytes:
        """The whole body. Raises BodyTooLarge as soon as it is known to be longer, BodyTimeout when it takes too long,
        ClientGone when it breaks off.
        """
        declared = self.header(b"content-length")
        if declared and declared.isdecimal() and int(declared) > limit_bytes:
            raise _too_large(int(declared), limit_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read_parts(limit_bytes)
        except TimeoutError:
            raise BodyTimeout(f"The body did not arrive within {timeout_s:g} seconds.") from None

    async def _read_parts(self, limit_bytes: int) -> bytes:
        parts: list[bytes] = []
        length = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            length += len(part)
            if length > limit_bytes:
                raise _too_large(length, limit_bytes)
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    async def while_connected(self, work: Awaitable[None]) -> None:
        """Awaits `work`; cancels it and raises ClientGone when the client disconnects or reads no more.

        Meanwhile an event stream with nothing to say gets a comment now and then.
        """
        self._task = task = asyncio.current_task()
        assert task is not None, "an ASGI application runs in a task"
        self._connection.on_lost = self._lose
        if self._connection.lost:
            self._lose()
        self._look_later()
        try:
            await work
        except asyncio.CancelledError:
            if not self._gone:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            self._connection.on_lost = None
            self._timer.cancel()

    async def respond(self, status: int, body: bytes, headers: tuple[Header, ...] | list[Header]) -> None:
        """Sends the whole answer."""
        await self._begin(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self._send_body(body, last=True)

    @property
    def open(self) -> bool:
        """`write_event` can be used: the stream has begun, and nothing before it is still on its way."""
        return self._streaming and not self._sending and self._connection.open

    def write_event(self, event: bytes) -> None:
        """Sends an event at once, while that is possible; else `send_event` does."""
        self._connection.write(event)
        self._sent_at = asyncio.get_running_loop().time()

    async def send_event(self, event: bytes) -> None:
        """Sends one server-sent event; the first one begins the answer."""
        await self._begin_stream()
        await self._send_body(event)

    async def end_stream(self, event: bytes) -> None:
        """Sends the last events."""
        await self._begin_stream()
        await self._send_body(event, last=True)

    async def fail(self, error: HeadraceError) -> None:
        """Says what went wrong, if anybody listens: as an HTTP error, or in the stream if that has begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._write_timeout_s):
                if self._streaming:
                    await self.end_stream(error_event(error))
                elif not self.status:
                    await self.respond(error.http_status, error_body(error), error_headers(error))

    async def _begin_stream(self) -> None:
        if not self._streaming:
            await self._begin(200, list(_SSE_HEADERS))
            self._streaming = True

    async def _begin(self, status: int, headers: list[Header]) -> None:
        self.status = status
        headers.append((b"x-request-id", self.request_id.encode()))
        headers += rate_limit_headers(self.account)
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, body: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        self._complete = self._complete or last

    async def _send(self, message: Message) -> None:
        """Waits while the client does not read what the server has buffered for it.

        `_look` bounds that: a timeout around every message would cost as much as the message.
        """
        self._sent_at = asyncio.get_running_loop().time()
        self._sending = True
        await self._asgi_send(message)
        self._sending = False

    def _lose(self) -> None:
        """The client has gone, or reads no more."""
        if not (self._complete or self._gone):
            self._gone = True
            assert self._task is not None, "it works on the answer"
            self._task.cancel()

    def _look_later(self) -> None:
        seconds = min(self._comment_every_s, self._write_timeout_s)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Sends a comment if nothing was sent for long; gives a client up that reads neither that nor an event."""
        silent_s = asyncio.get_running_loop().time() - self._sent_at
        if self._sending and silent_s >= self._write_timeout_s:
            self._lose()
        elif self._streaming and not (self._sending or self._complete) and silent_s >= self._comment_every_s:
            if self._connection.open:
                self.write_event(COMMENT)
            elif silent_s >= self._comment_every_s + self._write_timeout_s:
                self._lose()
        self._look_later()

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


def _too_large(length: int, limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body has at least {length} bytes, but the limit is {limit_bytes}.")
