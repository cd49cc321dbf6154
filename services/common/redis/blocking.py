"""A connection for commands that wait in Redis, one after the other, whose waits end without losing a reply."""

import asyncio
import builtins
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError, TimeoutError

from services.common.redis.client import ANSWER_TIMEOUT_S, Argument, RedisClient, connect, known_error, translated

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
        self._busy = False
        self._interrupted = False

    async def command(self, waiting: Command, then: Command, block_s: float) -> tuple[Any, Any] | None:
        """The replies to a command that waits up to `block_s` seconds, and to one that is carried out right after it.

        None, now and from now on, once this is interrupted. Raises ResponseError for the first, Unavailable.
        """
        if self._interrupted:
            return None
        # A task of its own that is never cancelled: what has been handed out must not be dropped.
        self._call = asyncio.ensure_future(self._exchange((waiting, then), block_s + ANSWER_TIMEOUT_S))
        try:
            first, second = await asyncio.shield(self._call)
        except Exception as error:
            raise translated(known_error(error)) from error
        if isinstance(first, Exception):
            raise translated(first)
        return None if first is None and self._interrupted else (first, second)

    async def interrupt(self) -> None:
        """Ends the wait that is under way, and all later ones at once. Raises Unavailable."""
        self._interrupted = True
        await self._unblock()

    async def close(self) -> None:
        await self._redis.aclose()  # ends what waits, too
        if self._call is not None:
            await asyncio.gather(self._call, return_exceptions=True)

    async def _unblock(self) -> None:
        if self._busy and self._id is not None:
            await self._client.command("CLIENT", "UNBLOCK", self._id)

    async def _exchange(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """The reply to each, an error among them. Raises when the connection fails."""
        if self._connection is None:
            self._connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        connection = self._connection
        assert connection is not None, "a pool gives one or raises"
        packed = b"".join([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(timeout_s):
                if self._id is None:
                    await connection.send_packed_command(hiredis.pack_command(("CLIENT", "ID")))  # type: ignore[arg-type]
                    self._id = await _reply(connection)
                self._busy = True
                await connection.send_packed_command(packed)
                if self._interrupted:  # meanwhile
                    await self._unblock()
                return [await _reply(connection) for _ in commands]
        except BaseException as error:
            self._id = None
            await connection.disconnect(nowait=True)
            if isinstance(error, builtins.TimeoutError):
                raise TimeoutError(f"no answer within {timeout_s:g} s") from None
            raise
        finally:
            self._busy = False


async def _reply(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
