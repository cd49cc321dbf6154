"""One connection to Redis, on which some commands travel together and their replies are handed over together.

redis-py opens it, which knows URLs, TLS and logins. From then on its streams are left out: their tasks, time limits and
wake-ups cost several times what is done with the commands.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, DefaultParser
from redis.exceptions import ConnectionError, InvalidResponse, ResponseError, TimeoutError

_NOT_YET = object()
# A TLS connection is not closed before the other side has said so, too.
_CLOSE_TIMEOUT_S = 2.0

OnReplies = Callable[[Sequence[Any]], None]


class Wire(asyncio.Protocol):
    """Carries one exchange at a time."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        """Takes the connection over from the streams that it was opened with."""
        self._writer = writer
        self._transport = writer.transport
        self._streams = self._transport.get_protocol()
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(InvalidResponse, DefaultParser.parse_error, notEnoughData=_NOT_YET)
        self._loop = asyncio.get_running_loop()
        # Of the exchange under way.
        self._replies: list[Any] = []
        self._wanted = 0
        self._on_replies: OnReplies = _nobody
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(cls, redis: Redis, timeout_s: float) -> "Wire":
        """Raises RedisError, OSError."""
        connection: Connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                if await connection.can_read():  # its end: nothing was asked
                    raise ConnectionError("Redis closed the connection")
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, asyncio.TimeoutError):
                raise TimeoutError(f"no answer within {timeout_s:g} s") from None
            raise
        writer = connection._writer
        assert writer is not None, "it is connected"
        connection._reader = connection._writer = None  # else it would close what is the wire's now
        return cls(writer)

    @property
    def open(self) -> bool:
        """It can be used, as far as is known."""
        return not self._transport.is_closing()

    def exchange(self, packed: bytes, count: int, timeout_s: float, on_replies: OnReplies) -> None:
        """Sends commands, `count` of them, and hands over as many replies, errors among them.

        A connection that fails meanwhile is over, and every reply that has not come is the reason. `on_replies` may be
        called before this returns, and must not raise.
        """
        assert not self._wanted, "one exchange at a time"
        self._replies, self._wanted, self._on_replies = [], count, on_replies
        self._timer = self._loop.call_later(timeout_s, self._time_out, timeout_s)
        if not self.open:
            self._fail(ConnectionError("the connection was closed"))
            return
        try:
            self._transport.write(packed)
        except RuntimeError as error:  # of uvloop, on what has just been closed
            self._fail(ConnectionError(str(error)))

    def ask(self, packed: bytes, count: int, timeout_s: float) -> "asyncio.Future[Sequence[Any]]":
        """An exchange for one who awaits the replies, ResponseErrors among them.

        It raises what is no reply: the connection failed, or Redis serves nobody now.
        """
        outcome: asyncio.Future[Sequence[Any]] = self._loop.create_future()

        def settle(replies: Sequence[Any]) -> None:
            failures = [
                reply for reply in replies if isinstance(reply, Exception) and not isinstance(reply, ResponseError)
            ]
            if outcome.done():
                return
            if failures:
                outcome.set_exception(failures[0])
            else:
                outcome.set_result(replies)

        self.exchange(packed, count, timeout_s, settle)
        return outcome

    def abort(self) -> None:
        """Hangs up at once; an exchange that is under way fails."""
        self._transport.abort()

    async def close(self) -> None:
        """Hangs up, and waits until that is done."""
        self._writer.close()
        with contextlib.suppress(Exception):  # whatever has ended it
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                self._replies.append(reply)
        except InvalidResponse as error:
            self._fail(error)
        if self._wanted and len(self._replies) == self._wanted:
            self._hand_over()
        elif len(self._replies) > self._wanted:
            self._fail(InvalidResponse("Redis said what it was not asked"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.connection_lost(exc)  # for whom `close` waits
        self._fail(ConnectionError(f"the connection was lost: {exc}" if exc else "the connection was closed"))

    def _time_out(self, timeout_s: float) -> None:
        self._fail(TimeoutError(f"no answer within {timeout_s:g} s"))

    def _fail(self, error: Exception) -> None:
        self._transport.abort()
        if self._wanted:
            self._replies = self._replies[: self._wanted]
            self._replies += [error] * (self._wanted - len(self._replies))
            self._hand_over()

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        replies, self._replies, self._wanted = self._replies, [], 0
        on_replies, self._on_replies = self._on_replies, _nobody
        on_replies(replies)


def _nobody(replies: Sequence[Any]) -> None:
    """Whom replies are handed to while nobody waits for any."""
