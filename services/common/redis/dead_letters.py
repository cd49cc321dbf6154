"""Requests that were given up: each failed on several workers. They are kept, the newest of them, until somebody looks
into them; one that is requeued runs again, and its answer is recorded for whoever asks.
"""

import re
import time
from dataclasses import dataclass
from uuid import uuid4

from headrace.v1.answer_pb2 import StoredRequest
from headrace.v1.job_pb2 import Job
from services.common.redis.answers import AnswerStore
from services.common.redis.client import RedisClient
from services.common.redis.keys import DEAD_LETTERS, JOB_FIELD, Owner, queue_stream

_MOST = 1000
# Nobody's heartbeat: a scheduler finds the job without its gateway, and offers it for adoption.
_NOBODY = Owner("gateway", "requeued", "0")
_TIMEOUT_MS = 600_000
_ANSWER_TTL_S = 24 * 3600.0
_ENTRY_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request, why it was given up, and when. `entry_id` names it: `MILLISECONDS-COUNTER`."""

    entry_id: str
    request: StoredRequest
    reason: str
    failures: int

    @property
    def unix_s(self) -> float:
        return int(self.entry_id.partition("-")[0]) / 1000


class DeadLetters:
    """The dead letters of all models. All raise Unavailable when Redis does not answer."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def add(self, request: bytes, reason: str, failures: int) -> None:
        """Keeps a request, and forgets the oldest of very many."""
        fields = ("request", request, "reason", reason, "failures", failures)
        await self._redis.command("XADD", DEAD_LETTERS, "MAXLEN", "~", _MOST, "*", *fields)

    async def all(self) -> list[DeadLetter]:
        """The oldest first."""
        entries = await self._redis.command("XRANGE", DEAD_LETTERS, "-", "+")
        return [_letter(entry_id, fields) for entry_id, fields in entries]

    async def find(self, entry_id: str) -> DeadLetter | None:
        """None as well for what is no id at all."""
        if not _ENTRY_ID.fullmatch(entry_id):
            return None
        entries = await self._redis.command("XRANGE", DEAD_LETTERS, entry_id, entry_id)
        return _letter(*entries[0]) if entries else None

    async def remove(self, letter: DeadLetter) -> None:
        await self._redis.command("XDEL", DEAD_LETTERS, letter.entry_id)

    async def requeue(self, letter: DeadLetter) -> str:
        """Has the request run again, from its beginning, and returns the id of its answer, which is kept for a day."""
        request = StoredRequest()
        request.CopyFrom(letter.request)
        now_ms = int(time.time() * 1000)
        request.accepted_unix_ms, request.deadline_unix_ms = now_ms, now_ms + _TIMEOUT_MS
        answer_id = f"requeued-{uuid4().hex}"
        await AnswerStore(self._redis, _NOBODY, ttl_s=_ANSWER_TTL_S).open(answer_id, request.SerializeToString(), b"")
        job = _job(request, answer_id)
        await self._redis.command(
            "XADD", queue_stream(job.model, job.priority), "*", JOB_FIELD, job.SerializeToString()
        )
        await self.remove(letter)
        return answer_id


def _letter(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    request = StoredRequest.FromString(fields[b"request"])
    return DeadLetter(entry_id.decode(), request, fields[b"reason"].decode(), int(fields[b"failures"]))


def _job(request: StoredRequest, answer_id: str) -> Job:
    return Job(
        request_id=request.internal_id,
        gateway_id=_NOBODY.id,
        gateway_incarnation=_NOBODY.incarnation,
        model=request.model,
        priority=request.priority,
        prompt_tokens=len(request.prompt_ids) // 4,
        choices=request.choices,
        max_tokens=request.stopping.max_tokens,
        enqueued_unix_ms=request.accepted_unix_ms,
        deadline_unix_ms=request.deadline_unix_ms,
        traceparent=request.traceparent,
        deterministic=request.deterministic,
        answer_id=answer_id,
        alone=True,  # it may be what killed its workers
    )
