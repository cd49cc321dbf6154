"""A connection for commands that wait in Redis, one after the other, whose waits end without losing a reply."""

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.exceptions import ResponseError

from services.common.redis.client import ANSWER_TIMEOUT_S, Argument, RedisClient, connect, known_error, translated
from services.common.redis.wire import Wire

Command = tuple[Argument, ...]


class BlockingConnection:
    """Beside a client, which tells Redis to end a wait."""

    def __init__(self, url: str, client: RedisClient) -> None:
        self._redis = connect(url)
        self._client = client
        self._wire: Wire | None = None
        self._call: asyncio.Future[Sequence[Any]] | None = None
        # What Redis calls the connection, while it stands.
        self._id: int | None = None
        self._waiting = False
        # The wait under way is to end, and there is to be no other.
        self._unwanted = False
        self._interrupted = False

    async def command(self, waiting: Command, then: Command, block_s: float) -> tuple[Any, Any] | None:
        """The replies to a command that waits up to `block_s` seconds, and to one that is carried out right after it.

        None, now and from now on, once this is interrupted. Raises ResponseError for the first, Unavailable.
        """
        if self._interrupted:
            return None
        self._unwanted = False
        # A task of its own that is never cancelled: what has been handed out must not be dropped.
        self._call = asyncio.ensure_future(self._exchange((waiting, then), block_s + ANSWER_TIMEOUT_S))
        try:
            first, second = await asyncio.shield(self._call)
        except Exception as error:
            raise translated(known_error(error)) from error
        if isinstance(first, Exception):
            raise translated(first)
        return None if first is None and self._interrupted else (first, second)

    async def end_wait(self) -> None:
        """Ends the wait that is under way, if there is one, as its time would. Raises Unavailable."""
        self._unwanted = True
        await self._unblock()

    async def interrupt(self) -> None:
        """Ends the wait that is under way, and all later ones at once. Raises Unavailable."""
        self._interrupted = True
        await self.end_wait()

    async def close(self) -> None:
        self._interrupted = True
        if self._wire is not None:
            self._wire.abort()  # ends what waits, too
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)
        if self._wire is not None:
            await self._wire.close()
        await self._redis.aclose()

    async def _unblock(self) -> None:
        if self._waiting and self._id is not None:
            await self._client.command("CLIENT", "UNBLOCK", self._id)

    async def _exchange(self, commands: Sequence[Command], timeout_s: float) -> Sequence[Any]:
        """The reply to each, an error of Redis among them. Raises when the connection fails."""
        wire = await self._connected()
        if self._interrupted:  # meanwhile
            return None, None
        replies = _sent(wire, commands, timeout_s)
        self._waiting = True
        try:
            if self._unwanted:  # meanwhile
                await self._unblock()
            return await replies
        except BaseException:
            if not replies.cancel():
                replies.exception()  # which is no news
            wire.abort()
            raise
        finally:
            self._waiting = False

    async def _connected(self) -> Wire:
        """The connection, whose id is known then. Raises ResponseError if that may not be asked for."""
        if self._wire is None or not self._wire.open:
            self._id, self._wire = None, await Wire.connect(self._redis, ANSWER_TIMEOUT_S)
        if self._id is None:
            (reply,) = await _sent(self._wire, [("CLIENT", "ID")], ANSWER_TIMEOUT_S)
            if isinstance(reply, ResponseError):
                raise reply
            self._id = reply
        return self._wire


def _sent(wire: Wire, commands: Sequence[Command], timeout_s: float) -> "asyncio.Future[Sequence[Any]]":
    packed = b"".join([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]
    return wire.ask(packed, len(commands), timeout_s)
