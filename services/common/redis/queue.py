"""The request queue: jobs wait here until a scheduler has a worker for them, and stay until their last event.

One stream per model and priority; the consumer group's pending-entries list says who owns an entry, and an entry's
idle time is its owner's lease. A gateway enqueues, takes over what it was offered, renews and acknowledges. A scheduler
pops, and reclaims what owners left behind. Knows nothing of workers or placements.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import DecodeError
from redis.exceptions import ResponseError

from headrace.v1.job_pb2 import Job
from services.common.redis import scripts
from services.common.redis.blocking import BlockingConnection
from services.common.redis.client import LONGEST_BLOCK_S, Argument, RedisClient
from services.common.redis.keys import (
    GROUP,
    JOB_FIELD,
    PRIORITIES,
    Owner,
    StreamEntry,
    gateway_heartbeat,
    heartbeat_of,
    known_priority,
    queue_stream,
    queue_streams,
)
from services.common.redis.scripts import Script

log = logging.getLogger(__name__)

LEASE_S = 5.0
"""How long an owner may stay silent before its entries are somebody else's; also how long a gateway's heartbeat lasts.
Owners renew about once a second, so that a lease survives a few lost renewals."""

FIRST_ATTEMPT = 1
"""What comes from the queue is a request's first attempt. Only a gateway knows of later ones."""

# A live gateway renews all it runs. An entry that it does not renew for this many leases is one it does not know of
# (the answer to its take-over was lost): it is offered again, and the gateway says what it makes of it.
_FORGOTTEN_LEASES = 3
_RECLAIM_PAGE = 128
_RECLAIM_LIMIT = 1024
_RELEASED_IDLE_MS = 24 * 3600 * 1000
_FORGET_CONSUMER_MS = 3600 * 1000
_JUST_COME_US = 2000  # ids tell whole milliseconds


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job and its entry. `entry_id`, as `MILLISECONDS-COUNTER`, is unique within one model and priority."""

    entry_id: str
    job: Job
    # How long it was in the queue when it was popped, by Redis' clock, which made its id; None: it was not popped.
    waited_us: int | None = field(default=None, compare=False)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts jobs of a model as they are to be served: by priority, then by age."""
        milliseconds, counter = self.entry_id.split("-")
        return known_priority(self.job.priority), int(milliseconds), int(counter)


@dataclass(frozen=True, slots=True)
class _Expired:
    """An entry whose owner's lease ran out."""

    entry_id: str
    owner: str
    idle_ms: int
    job: Job

    @property
    def heartbeat(self) -> str:
        """Of the gateway that runs it: the owner, which may have adopted it, or else the one that it came from."""
        if self.owner.startswith("g:"):
            return heartbeat_of(self.owner)
        return gateway_heartbeat(self.job.gateway_id, self.job.gateway_incarnation)


class Depth(NamedTuple):
    """How many jobs wait, and since when the oldest of them."""

    jobs: int
    oldest_s: float


class Reclaimed(NamedTuple):
    """What owners left behind."""

    # To be placed again; this scheduler's now.
    jobs: list[QueuedJob]
    # Their gateway is dead, and another one can go on with them; this scheduler's until one does.
    orphans: list[QueuedJob]
    # Ended here, because their gateway is dead and so are their callers' connections.
    closed: list[QueuedJob]


class JobQueue:
    """The queue as one gateway or one scheduler uses it. All raise Unavailable when Redis does not answer."""

    def __init__(
        self,
        redis_url: str,
        owner: Owner,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = redis_url
        self._redis = RedisClient(redis_url, clock=clock)
        self._owner = owner
        self._lease_ms = int(lease_s * 1000)

    @property
    def redis(self) -> RedisClient:
        """The connection, for commands that are to travel with the queue's."""
        return self._redis

    async def check(self, *, allow_volatile: bool = False) -> None:
        """Raises UnfitRedis for a Redis without AOF (unless `allow_volatile`), that evicts, or older than 6.2."""
        await self._redis.check(allow_volatile=allow_volatile)

    # --- the gateway's side

    async def enqueue(self, job: Job) -> str:
        """Adds a job and returns its entry id. When this raises, the job may have been added nonetheless: an offer that
        the gateway then answers `gone` ends it. A gateway renews once before it enqueues its first job: without a
        heartbeat it counts as lost.
        """
        stream, field, value = queue_entry(job)
        entry_id: bytes = await self._redis.command("XADD", stream, "*", field, value)
        return entry_id.decode()

    async def take_over(self, entries: Iterable[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Makes this gateway the owner of entries it was offered; returns those that are gone or another gateway's."""
        return await _select(entries, self._claim)

    async def renew(self, entries: Iterable[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Renews the leases of this owner's entries, and a gateway's heartbeat; returns the entries it has lost.

        A gateway gets back an entry that a scheduler has picked up meanwhile.
        """
        lost, _ = await asyncio.gather(_select(entries, self._claim), self._beat())
        return lost

    async def missing(self, entries: Iterable[tuple[Job, str]]) -> list[tuple[Job, str]]:
        """Those of the entries that Redis does not hold: ended by somebody, or forgotten in a restart of Redis."""
        return await _select(entries, self._not_held)

    async def acknowledge(self, entries: Iterable[tuple[Job, str]], *, hurry: bool = False) -> None:
        """Ends entries: after a job's last event, or to withdraw it while it waits. Does nothing the second time."""
        await asyncio.gather(
            *(
                self._redis.script(
                    scripts.ACKNOWLEDGE, [stream], (GROUP, self._owner.consumer, *entry_ids), hurry=hurry
                )
                for stream, entry_ids in _by_stream(entries).items()
            )
        )

    async def retire(self) -> None:
        """Says that this gateway is gone, so that others need not wait for its heartbeat to run out."""
        await self._redis.command("DEL", gateway_heartbeat(self._owner.id, self._owner.incarnation))

    # --- the scheduler's side

    async def pop(self, model: str, count: int) -> list[QueuedJob]:
        """Takes up to `count` waiting jobs, best rank first. Fewer than `count`: no more were waiting.

        An entry that holds no job is left to its lease, and `reclaim` ends it.
        """
        streams = queue_streams(model)
        time, *taken = await self._redis.script(scripts.POP, streams, (GROUP, self._owner.consumer, count))
        return _popped(zip(streams, taken, strict=True), time)

    def arrivals(self, model: str) -> "Arrivals":
        """For jobs that come to an empty queue. To be closed."""
        return Arrivals(model, self._owner, BlockingConnection(self._url, self._redis))

    async def remove(self, jobs: Iterable[QueuedJob]) -> None:
        """Ends entries that this scheduler owns, because their gateways no longer want them."""
        await self.acknowledge(((queued.job, queued.entry_id) for queued in jobs), hurry=True)

    async def reclaim(self, model: str) -> Reclaimed:
        """Picks up entries whose owner's lease ran out, and ends those that nobody can go on with.

        A pause of Redis lets the heartbeats of live gateways run out. So none counts as gone before Redis has answered
        for a full lease, in which they beat again.
        """
        reclaimed = Reclaimed([], [], [])
        for stream in queue_streams(model):
            expired = await self._expired(stream)
            alive = await self._existing({entry.heartbeat for entry in expired})
            may_close = self._redis.answering_s * 1000 > self._lease_ms
            dead = [entry for entry in expired if may_close and entry.heartbeat not in alive]
            left = [entry for entry in expired if entry.heartbeat in alive and self._left_behind(entry)]
            orphans = [entry for entry in dead if entry.job.answer_id]
            others = [entry for entry in dead if not entry.job.answer_id]
            reclaimed.jobs.extend(await self._seize(scripts.TAKE, stream, left))
            reclaimed.orphans.extend(await self._seize(scripts.TAKE, stream, orphans))
            reclaimed.closed.extend(await self._seize(scripts.CLOSE, stream, others))
            await self._redis.script(scripts.TIDY, [stream], (GROUP, _FORGET_CONSUMER_MS))
        return reclaimed

    async def depths(self, model: str) -> dict[int, Depth]:
        """Jobs that no gateway runs yet, by priority."""
        found: list[tuple[int, int]] = await self._redis.script(scripts.DEPTHS, queue_streams(model), (GROUP,))
        return {
            int(priority): Depth(jobs, oldest_ms / 1000)
            for priority, (jobs, oldest_ms) in zip(PRIORITIES, found, strict=True)
        }

    async def close(self) -> None:
        await self._redis.close()

    # --- what both sides share

    async def release(self, jobs: Iterable[QueuedJob]) -> None:
        """Gives up this owner's leases, so that any scheduler can reclaim the jobs at once."""
        for stream, entry_ids in _by_stream((queued.job, queued.entry_id) for queued in jobs).items():
            arguments: list[Argument] = [GROUP, self._owner.consumer, _RELEASED_IDLE_MS, *entry_ids]
            await self._redis.script(scripts.RELEASE, [stream], arguments)

    async def _claim(self, stream: str, entry_ids: list[str]) -> set[str]:
        """Returns the ids that could not be claimed."""
        arguments: list[Argument] = [GROUP, self._owner.consumer, *entry_ids]
        lost: list[bytes] = await self._redis.script(scripts.CLAIM, [stream], arguments, hurry=False)
        return {entry_id.decode() for entry_id in lost}

    async def _not_held(self, stream: str, entry_ids: list[str]) -> set[str]:
        missing: list[bytes] = await self._redis.script(scripts.MISSING, [stream], entry_ids)
        return {entry_id.decode() for entry_id in missing}

    async def _beat(self) -> None:
        if self._owner.kind == "gateway":
            key = gateway_heartbeat(self._owner.id, self._owner.incarnation)
            await self._redis.command("SET", key, "1", "PX", self._lease_ms)

    async def _expired(self, stream: str) -> list[_Expired]:
        """The entries of this stream whose lease ran out; ends those that hold no job."""
        expired: list[_Expired] = []
        broken: list[str] = []
        begin = "-"
        while len(expired) < _RECLAIM_LIMIT:
            arguments = (GROUP, self._lease_ms, begin, _RECLAIM_PAGE)
            looked_at, last, entries = await self._redis.script(scripts.EXPIRED, [stream], arguments)
            for entry_id, owner, idle_ms, fields in entries:
                if (job := _decode(stream, fields)) is None:
                    broken.append(entry_id.decode())
                else:
                    expired.append(_Expired(entry_id.decode(), owner.decode(), idle_ms, job))
            if looked_at < _RECLAIM_PAGE:
                break
            begin = "(" + last.decode()
        if broken:
            log.error("entries %s of %s hold no job of that queue and are removed", ", ".join(broken), stream)
            await self._seize_ids(scripts.CLOSE, stream, broken)
        return expired

    async def _existing(self, keys: set[str]) -> set[str]:
        ordered = list(keys)
        found = await asyncio.gather(*(self._redis.command("EXISTS", key) for key in ordered))
        return {key for key, exists in zip(ordered, found, strict=True) if exists}

    def _left_behind(self, entry: _Expired) -> bool:
        """Whether an entry of a live gateway is to be offered again."""
        return entry.owner.startswith("s:") or entry.idle_ms > _FORGOTTEN_LEASES * self._lease_ms

    async def _seize(self, script: Script, stream: str, entries: list[_Expired]) -> list[QueuedJob]:
        seized = await self._seize_ids(script, stream, [entry.entry_id for entry in entries])
        return [QueuedJob(entry.entry_id, entry.job) for entry in entries if entry.entry_id in seized]

    async def _seize_ids(self, script: Script, stream: str, entry_ids: list[str]) -> set[str]:
        if not entry_ids:
            return set()
        arguments: list[Argument] = [GROUP, self._owner.consumer, self._lease_ms, *entry_ids]
        seized: list[bytes] = await self._redis.script(script, [stream], arguments)
        return {entry_id.decode() for entry_id in seized}


class Arrived(NamedTuple):
    """Jobs that came, and whether more may wait than these."""

    jobs: list[QueuedJob]
    more: bool


class Arrivals:
    """Hands jobs to a scheduler in the moment they come: faster than a `pop` after a sign that there are some, but
    without regard to priority among those that wait already.
    """

    def __init__(self, model: str, owner: Owner, connection: BlockingConnection) -> None:
        self._streams = queue_streams(model)
        self._owner = owner
        self._connection = connection

    async def next(self, count: int, timeout_s: float) -> Arrived:
        """Takes the next jobs, up to `count` of each priority; none after `timeout_s` seconds or once interrupted. To
        be called when `pop` found too few. Raises Unavailable.
        """
        block_s = min(timeout_s, LONGEST_BLOCK_S)
        read = ("XREADGROUP", "GROUP", GROUP, self._owner.consumer, "COUNT", count, "BLOCK", int(block_s * 1000))
        try:
            replies = await self._connection.command(
                (*read, "STREAMS", *self._streams, *(">" for _ in self._streams)), ("TIME",), block_s
            )
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            return Arrived([], more=True)  # Redis lost the group, which `pop` makes
        if replies is None:
            return Arrived([], more=False)
        taken, time = [(stream.decode(), entries) for stream, entries in replies[0] or ()], replies[1]
        jobs = _popped(taken, time)
        # What was handed over as it came was all there was, however few were asked for.
        had_waited = any((queued.waited_us or 0) > _JUST_COME_US for queued in jobs)
        return Arrived(jobs, more=had_waited and any(len(entries) == count for _, entries in taken))

    async def end_wait(self) -> None:
        """Ends a wait that is under way, with what it has. Raises Unavailable."""
        await self._connection.end_wait()

    async def interrupt(self) -> None:
        """Ends a wait that is under way, and all later ones. Raises Unavailable."""
        await self._connection.interrupt()

    async def close(self) -> None:
        await self._connection.close()


def queue_entry(job: Job) -> StreamEntry:
    """What a job is in Redis, for a script that adds it beside other things."""
    return StreamEntry(queue_stream(job.model, job.priority), JOB_FIELD, job.SerializeToString())


def _popped(taken: Iterable[tuple[str, list[tuple[bytes, list[bytes]]]]], time: tuple[bytes, bytes]) -> list[QueuedJob]:
    """The jobs among entries of streams, at that time of Redis."""
    now_us = int(time[0]) * 1_000_000 + int(time[1])
    jobs = [(entry_id.decode(), _decode(stream, fields)) for stream, entries in taken for entry_id, fields in entries]
    return [QueuedJob(entry_id, job, _age_us(entry_id, now_us)) for entry_id, job in jobs if job is not None]


def _age_us(entry_id: str, now_us: int) -> int:
    return max(0, now_us - int(entry_id.split("-")[0]) * 1000)


def _decode(stream: str, fields: list[bytes]) -> Job | None:
    """The job in an entry of this stream; None if whoever wrote the entry put none there that belongs there."""
    try:
        job = Job.FromString(dict(zip(fields[::2], fields[1::2], strict=True))[JOB_FIELD.encode()])
    except (KeyError, DecodeError):
        return None
    return job if queue_stream(job.model, job.priority) == stream else None


def _by_stream(entries: Iterable[tuple[Job, str]]) -> dict[str, list[str]]:
    by_stream: dict[str, list[str]] = defaultdict(list)
    for job, entry_id in entries:
        by_stream[queue_stream(job.model, job.priority)].append(entry_id)
    return by_stream


async def _select(
    entries: Iterable[tuple[Job, str]], choose: Callable[[str, list[str]], Awaitable[set[str]]]
) -> list[tuple[Job, str]]:
    """The entries whose ids `choose` picks, asked once per stream."""
    by_stream: dict[str, list[tuple[Job, str]]] = defaultdict(list)
    for job, entry_id in entries:
        by_stream[queue_stream(job.model, job.priority)].append((job, entry_id))
    chosen = await asyncio.gather(
        *(choose(stream, [entry_id for _, entry_id in own]) for stream, own in by_stream.items())
    )
    return [
        (job, entry_id)
        for own, ids in zip(by_stream.values(), chosen, strict=True)
        for job, entry_id in own
        if entry_id in ids
    ]
