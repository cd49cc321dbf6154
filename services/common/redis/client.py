"""A connection to Redis that pipelines by itself, knows scripts, and tells what is passing from what is a bug.

Knows nothing of queues. Commands of concurrent callers that wait at the same moment travel together in one pipeline,
which costs each a fraction of a round trip of its own.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from services.common.errors import HeadraceError, Unavailable
from services.common.redis.scripts import Script
from services.common.redis.wire import Wire

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
# A Redis that is stopped or cut off keeps its connections open: this long, and the caller is told.
ANSWER_TIMEOUT_S = 3.0
LONGEST_BLOCK_S = 10.0
_LONGEST_ANSWER_S = 1.0  # a Redis that takes longer stood still
_PIPELINE_LENGTH = 256
# What nobody is in a hurry for waits so long for a command to travel with: a busy gateway has one sooner.
_COMPANY_WITHIN_S = 0.005
_OLDEST_VERSION = (6, 2)
# What says "not now". redis-py has classes for some replies; others, and those within a script's error, are text.
_PASSING_ERRORS = (
    ConnectionError,
    TimeoutError,
    OSError,
    ReadOnlyError,
    OutOfMemoryError,
    ClusterDownError,
    MasterDownError,
    TryAgainError,
)
_PASSING_REPLIES = ("-READONLY", "-OOM", "MISCONF", "NOREPLICAS", "MASTERDOWN", "BUSY ")

Argument = str | bytes | int


class UnfitRedis(HeadraceError):
    """This Redis could lose accepted requests, so a service does not start on it."""


class _Waiting(NamedTuple):
    """A command and who waits for its reply."""

    packed: bytes
    reply: asyncio.Future[Any]


class RedisClient:
    """Commands and scripts on one Redis; every method raises Unavailable when it does not answer."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = connect(url)
        self._wire: Wire | None = None
        self._opening: asyncio.Task[None] | None = None
        self._pending: list[_Waiting] = []
        # The pipeline that is under way.
        self._sent: list[_Waiting] = []
        # Something of what is pending is not to wait for company.
        self._hurry = False
        # What is pending is going to be sent in a moment.
        self._due = False
        # Runs out when what waits for company has waited long enough.
        self._timer: asyncio.TimerHandle | None = None
        # Whoever closes it is told when nothing is pending or under way.
        self._closing: asyncio.Future[None] | None = None
        self._closed = False
        # Connections beside the pipeline's for commands that block: those that wait for their next one, those that one
        # waits on, and those that are being made.
        self._spare: list[Wire] = []
        self._blocked: set[Wire] = set()
        self._connecting: set[asyncio.Task[Wire]] = set()
        self._clock = clock
        self._away_at = self._sent_at = clock()

    @property
    def answering_s(self) -> float:
        """For how many seconds Redis has been answering all commands, and soon; at most since this client was made."""
        return self._clock() - self._away_at

    async def command(self, *command: Argument, hurry: bool = True) -> Any:
        """Sends one command and returns its reply, as redis-py reads it in RESP2.

        Commands reach Redis in the order of the calls. One without hurry waits some milliseconds for another to come.
        """
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
        self._pending.append(_Waiting(packed, reply))
        self._hurry = self._hurry or hurry
        if not (self._due or self._sent):
            if self._hurry:
                self._due = True
                loop.call_soon(self._send_soon, loop)
            elif self._timer is None:
                self._timer = loop.call_later(_COMPANY_WITHIN_S, self._end_wait)
        return self._read(command, await reply)

    async def script(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument], *, hurry: bool = True
    ) -> Any:
        """Runs a script by its hash; sends its text when Redis does not know it (first use, or a restart)."""
        try:
            return await self.command("EVALSHA", script.sha, len(keys), *keys, *arguments, hurry=hurry)
        except NoScriptError:
            return await self.command("EVAL", script.text, len(keys), *keys, *arguments, hurry=hurry)

    async def blocking_command(self, *command: Argument) -> Any:
        """Sends a command that Redis answers after LONGEST_BLOCK_S at the latest, beside the pipeline.

        It has a connection to itself. If its caller is cancelled, that is closed: nothing else ends the wait in Redis.
        """
        packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
        try:
            (reply,) = await self._ask_beside(packed)
        except Exception as error:
            raise translated(known_error(error)) from error
        if isinstance(reply, Exception):
            raise translated(reply)
        return self._read(command, reply)

    async def check(self, *, allow_volatile: bool) -> None:
        """Raises UnfitRedis unless this Redis keeps what it accepted."""
        info: dict[str, Any] = await self.command("INFO")
        version = str(info["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_VERSION:
            raise UnfitRedis(f"Redis {version} is too old: Headrace needs 6.2 or newer.")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise UnfitRedis(
                f"Redis may evict queued requests: its maxmemory-policy is {policy}, and Headrace needs noeviction."
            )
        if not info.get("aof_enabled") and not allow_volatile:
            raise UnfitRedis("Redis would forget queued requests in a restart: start it with --appendonly yes.")

    async def close(self) -> None:
        """Sends what waits and hangs up."""
        while self._pending or self._sent:  # a script that was not known is sent again
            if self._closing is None:
                self._closing = asyncio.get_running_loop().create_future()
            self._end_wait()
            await asyncio.shield(self._closing)
        if self._wire is not None:
            await self._wire.close()
        self._closed = True
        await asyncio.gather(*(wire.close() for wire in [*self._blocked, *self._spare]))  # ends what is blocked, too
        if self._connecting:
            await asyncio.wait(self._connecting)
        await self._redis.aclose()

    def _read(self, command: Sequence[Argument], reply: Any) -> Any:
        """A reply as redis-py reads it."""
        read = self._redis.response_callbacks.get(str(command[0]))
        return reply if read is None else read(reply)

    async def _ask_beside(self, packed: bytes) -> Sequence[Any]:
        """The reply to a command that blocks. Its connection is kept for the next one if all went well."""
        wire = self._spare_wire() or await self._another_wire()
        self._blocked.add(wire)
        try:
            replies = await wire.ask(packed, 1, LONGEST_BLOCK_S + ANSWER_TIMEOUT_S)
        except BaseException:
            wire.abort()
            raise
        finally:
            self._blocked.discard(wire)
        self._spare.append(wire)
        return replies

    def _spare_wire(self) -> Wire | None:
        while self._spare:
            if (wire := self._spare.pop()).open:
                return wire
        return None

    async def _another_wire(self) -> Wire:
        # A task of its own: redis-py writes within asyncio.wait_for, which in Python 3.11 loses a cancellation that
        # comes as the write ends.
        connecting = asyncio.create_task(Wire.connect(self._redis, ANSWER_TIMEOUT_S), name="redis connection")
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        try:
            wire = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.cancel()
            connecting.add_done_callback(_hang_up)
            raise
        if self._closed:  # meanwhile
            wire.abort()
            raise ConnectionError("the client was closed")
        return wire

    def _end_wait(self) -> None:
        """Nothing waits for company any longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._hurry = bool(self._pending)
        self._send()

    def _send_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """What is on its way here now, such as the rest of a request's end, travels with what has come."""
        loop.call_soon(self._send)

    def _send(self) -> None:
        """Sends what waits, unless something is under way: what arrives meanwhile makes up the next pipeline."""
        self._due = False
        if self._sent or not self._hurry:
            return
        if self._wire is None or not self._wire.open:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open(), name="redis connection")
            return
        self._take_pending()
        packed = b"".join([waiting.packed for waiting in self._sent])
        self._wire.exchange(packed, len(self._sent), ANSWER_TIMEOUT_S, self._replied)

    async def _open(self) -> None:
        """Connects, then sends what waits; or tells those who wait why not."""
        began_at = self._clock()
        try:
            self._wire = await Wire.connect(self._redis, ANSWER_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, all who wait get it
            self._take_pending()
            self._replied([known_error(error)] * len(self._sent))
        finally:
            self._opening = None
        self._heard(began_at)
        self._send()

    def _take_pending(self) -> None:
        self._sent, self._pending = self._pending[:_PIPELINE_LENGTH], self._pending[_PIPELINE_LENGTH:]
        self._hurry = bool(self._pending)
        self._sent_at = self._clock()

    def _replied(self, replies: Sequence[Any]) -> None:
        """What is under way has these replies, errors among them."""
        self._heard(self._sent_at)
        sent, self._sent = self._sent, []
        for waiting, reply in zip(sent, replies, strict=True):
            self._settle(waiting, reply)
        if self._hurry:
            self._send()
        elif self._pending and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_COMPANY_WITHIN_S, self._end_wait)
        if self._closing is not None and not (self._pending or self._sent):
            self._closing.set_result(None)
            self._closing = None

    def _heard(self, asked_at: float) -> None:
        """Redis has let us in, or answered."""
        if self._clock() - asked_at > _LONGEST_ANSWER_S:
            self._away_at = self._clock()

    def _settle(self, waiting: _Waiting, reply: Any) -> None:
        if isinstance(reply, Exception):
            reply = translated(known_error(reply))
            if isinstance(reply, Unavailable):
                self._away_at = self._clock()
        if waiting.reply.done():
            return
        if isinstance(reply, Exception):
            waiting.reply.set_exception(reply)
        else:
            waiting.reply.set_result(reply)


def _hang_up(connecting: asyncio.Task[Wire]) -> None:
    """Nobody wants this connection any more, if there is one in the end."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().abort()


def connect(url: str) -> Redis:
    """redis-py on this URL. A wire that it connects keeps the time of what is read."""
    return Redis.from_url(
        url,
        protocol=2,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=None,
        # An XADD sent twice is a job queued twice: whoever calls decides what is tried again.
        retry=Retry(NoBackoff(), 0),
    )


def is_redis_url(url: str) -> bool:
    """Whether `connect` takes it."""
    try:
        parse_url(url)
    except ValueError:
        return False
    return True


def known_error(error: Exception) -> Exception:
    """An error as redis-py should have said it: uvloop raises RuntimeError when a closed connection is written to."""
    if isinstance(error, (RedisError, OSError)):
        return error
    log.warning("the connection to Redis failed in an unexpected way", exc_info=error)
    return ConnectionError(f"{type(error).__name__}: {error}")


def translated(error: Exception) -> Exception:
    """Unavailable for what passes; anything else is a bug of ours and stays as it is."""
    if isinstance(error, _PASSING_ERRORS):
        return Unavailable(f"Redis does not answer: {error}.")
    if isinstance(error, ResponseError) and any(reply in str(error) for reply in _PASSING_REPLIES):
        return Unavailable(f"Redis cannot serve now: {error}.")
    return error
