"""A connection for commands that wait in Redis, one after the other, whose waits end without losing a reply."""

import asyncio
import builtins
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError, TimeoutError

from services.common.redis.client import ANSWER_TIMEOUT_S, Argument, RedisClient, connect, known_error, translated

# A connection that has not been used for so long is looked at first: it may have been closed, and looking takes time.
_LOOK_AFTER_S = 1.0

Command = tuple[Argument, ...]


class BlockingConnection:
    """Beside a client, which tells Redis to end a wait."""

    def __init__(self, url: str, client: RedisClient) -> None:
        self._redis = connect(url, None)  # `_exchange` keeps the time
        self._client = client
        self._connection: Connection | None = None
        self._call: asyncio.Future[list[Any]] | None = None
        # What Redis calls the connection, while it stands.
        self._id: int | None = None
        self._waiting = False
        self._used_at = 0.0  # loop time
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
        await self._redis.aclose()  # ends what waits, too
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)

    async def _unblock(self) -> None:
        if self._waiting and self._id is not None:
            await self._client.command("CLIENT", "UNBLOCK", self._id)

    async def _exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """The reply to each, an error among them. Raises when the connection fails."""
        packed = b"".join([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected()
                self._waiting = True
                await connection.send_packed_command(packed)
                if self._unwanted:  # meanwhile
                    await self._unblock()
                return [await _reply(connection) for _ in commands]
        except BaseException as error:
            if self._connection is not None:
                await self._connection.disconnect(nowait=True)
            if isinstance(error, builtins.TimeoutError):
                raise TimeoutError(f"no answer within {timeout_s:g} s") from None
            raise
        finally:
            self._waiting = False
            self._used_at = asyncio.get_running_loop().time()

    async def _connected(self) -> Connection:
        """The connection, whose id is known then. Raises ResponseError if that may not be asked for."""
        if self._connection is None:
            self._connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        connection = self._connection
        assert connection is not None, "a pool gives one or raises"
        idle_s = asyncio.get_running_loop().time() - self._used_at
        if idle_s > _LOOK_AFTER_S and connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)  # what was to be read is its end
        if self._id is None or not connection.is_connected:
            await connection.send_packed_command(hiredis.pack_command(("CLIENT", "ID")))  # type: ignore[arg-type]
            self._id = await connection.read_response()
        return connection


async def _reply(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
