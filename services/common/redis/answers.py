"""Answers that their callers may come back for: the request, and every event before its caller sees it.

An answer belongs to the gateway that runs it; only the owner appends, and only at the next position, so what a gateway
adds that was stopped and wakes up late goes nowhere. When the owner's heartbeat is gone, another gateway adopts the
answer. It is forgotten some time after its last event. Knows nothing of tokens or text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.common.redis import scripts
from services.common.redis.client import LONGEST_BLOCK_S, RedisClient
from services.common.redis.keys import Owner, answer_events, answer_request, heartbeat_of

_PAGE = 512
# Whoever has found an answer reads its first events within this time.
_LAST_WORD_MS = 10_000


class State(Enum):
    """Whether an answer has ended, and how."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


class Standing(Enum):
    """What has become of an answer that this gateway runs."""

    OWNED = "owned"
    # Owned, but its caller wants it ended.
    CANCELLED = "cancelled"
    # Another gateway has adopted it.
    LOST = "lost"
    # Redis does not know it: it was forgotten in a restart.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer without its events. `request` is what its gateway stored; `attempt` the number of the newest one."""

    request: bytes
    fingerprint: bytes
    owner: str
    state: State
    attempt: int


class AnswerStore:
    """The answers, as one gateway uses them. All raise Unavailable when Redis does not answer."""

    def __init__(self, redis: RedisClient, owner: Owner, *, ttl_s: float) -> None:
        self._redis = redis
        self._owner = owner.consumer
        self._ttl_ms = int(ttl_s * 1000)

    async def open(self, answer_id: str, request: bytes, fingerprint: bytes) -> bytes | None:
        """Begins an answer of this gateway. If there is one already, returns its fingerprint and does nothing."""
        arguments = (self._owner, request, fingerprint, self._ttl_ms)
        found: bytes | None = await self._redis.script(scripts.ANSWER_OPEN, _keys(answer_id), arguments)
        return found

    async def append(
        self, answer_id: str, position: int, events: Sequence[bytes], *, attempt: int = 0, state: State = State.OPEN
    ) -> tuple[Standing, int]:
        """Adds events from `position` on, if that is the next one, and if this gateway owns the answer.

        Returns how the answer stands and how many events it has. Without events it only says so.
        """
        arguments = (self._owner, position, attempt, state.value, self._ttl_ms, *events)
        standing, length = await self._redis.script(scripts.ANSWER_APPEND, _keys(answer_id), arguments)
        return Standing(standing.decode()), length

    async def discard(self, answer_id: str, event: bytes) -> None:
        """Forgets an answer of this gateway that has not begun. Those who read it already get the event."""
        await self._redis.script(scripts.ANSWER_DISCARD, _keys(answer_id), (self._owner, event, _LAST_WORD_MS))

    async def adopt(self, answer_id: str, former_owner: str) -> bool:
        """Makes an answer this gateway's if its owner is dead. False: it lives, or somebody else was faster."""
        if former_owner != self._owner and await self._redis.command("EXISTS", heartbeat_of(former_owner)):
            return False
        arguments = (former_owner, self._owner)
        return bool(await self._redis.script(scripts.ANSWER_ADOPT, [answer_request(answer_id)], arguments))

    async def cancel(self, answer_id: str) -> bool:
        """Asks whoever owns an answer to end it. False: it has ended."""
        return bool(await self._redis.script(scripts.ANSWER_CANCEL, [answer_request(answer_id)], ()))

    async def find(self, answer_id: str) -> StoredAnswer | None:
        """The answer of that id, if it is kept."""
        fields = ("request", "fingerprint", "owner", "state", "attempt")
        request, fingerprint, owner, state, attempt = await self._redis.command(
            "HMGET", answer_request(answer_id), *fields
        )
        if request is None:
            return None
        return StoredAnswer(request, fingerprint, owner.decode(), State(state.decode()), int(attempt))

    async def read(self, answer_id: str, position: int) -> list[bytes]:
        """Events from `position` on, as many as make up a page."""
        entries = await self._redis.command(
            "XRANGE", answer_events(answer_id), f"0-{position + 1}", "+", "COUNT", _PAGE
        )
        return [fields[b"event"] for _, fields in entries]

    async def wait(self, answer_id: str, position: int) -> None:
        """Returns when there is an event at `position`, or after some seconds."""
        stream, after, block_ms = answer_events(answer_id), f"0-{position}", int(LONGEST_BLOCK_S * 1000)
        await self._redis.blocking_command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", stream, after)


def _keys(answer_id: str) -> list[str]:
    return [answer_request(answer_id), answer_events(answer_id)]
