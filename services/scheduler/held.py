"""The jobs of one model that a scheduler holds, from their arrival until their gateway's answer.

    waiting   in the order of its rank, until a worker has room
    parked    its gateway is not connected here; it may be on its way back
    offered   a worker's credits are reserved, and the gateway has a lease to answer in

A job that has to be alone may wait for long, until a worker is idle; those that need not can be had apart.

Rank: requests that run already come first, since their clients have seen tokens; then those that a worker answered busy
and those from the queue alike, by priority and age.
"""

import heapq
import itertools
from dataclasses import dataclass
from enum import Enum

from headrace.v1 import scheduler_pb2
from services.common.block_hash import split_hashes
from services.common.redis.queue import FIRST_ATTEMPT, QueuedJob
from services.scheduler.gateways import GatewayKey
from services.scheduler.kv_plans import JobShape
from services.scheduler.outstanding import PlacementKey


class Where(Enum):
    """What a held job waits for."""

    WAITING = "a worker"
    PARKED = "its gateway"
    OFFERED = "an answer"


@dataclass(slots=True, eq=False)
class HeldJob:
    """A job that this scheduler holds."""

    queued: QueuedJob
    attempt: int
    rank: tuple[int, ...]
    shape: JobShape
    replaces: bool
    """Its gateway asked for another placement: the queue entry is the gateway's."""
    arrived: float | None = None
    """When it came here first, on the dispatcher's clock."""
    since: float = 0.0
    """When it came to be where it is, on the dispatcher's clock."""
    where: Where = Where.WAITING
    worker_ids: tuple[str, ...] = ()
    """The workers on which its offer has reserved something."""
    tried_worker_id: str = ""
    tried_reports: int | None = None
    """How often that worker had reported when the job failed on it."""

    @classmethod
    def from_queue(cls, queued: QueuedJob) -> "HeldJob":
        return cls(queued, FIRST_ATTEMPT, (1, *queued.rank), _shape(queued, failed=False), replaces=False)

    @classmethod
    def from_request(cls, request: scheduler_pb2.PlacementRequest) -> "HeldJob":
        queued = QueuedJob(request.queue_entry_id, request.job)
        busy = request.reason == scheduler_pb2.PlacementRequest.REASON_BUSY
        failed = request.job.alone or request.reason == scheduler_pb2.PlacementRequest.REASON_WORKER_LOST
        shape = _shape(queued, failed=failed)
        held = cls(queued, request.attempt, (1 if busy else 0, *queued.rank), shape, replaces=True)
        held.tried_worker_id = request.tried_worker_id
        return held

    @property
    def key(self) -> PlacementKey:
        return self.queued.job.request_id, self.attempt

    def queued_us(self, now: float) -> int | None:
        """How long it has waited for a worker, before it came here and since; None if that is not known."""
        before_us = 0 if self.replaces else self.queued.waited_us
        if before_us is None or self.arrived is None:
            return None
        return before_us + int((now - self.arrived) * 1e6)

    @property
    def gateway(self) -> GatewayKey:
        return self.queued.job.gateway_id, self.queued.job.gateway_incarnation


_Place = tuple[tuple[int, ...], int, HeldJob]
"""Rank, a number of its own, and who has that place in the order."""


class HeldJobs:
    """All held jobs, at most one per (request, attempt)."""

    def __init__(self) -> None:
        self._jobs: dict[PlacementKey, HeldJob] = {}
        self._sociable: list[_Place] = []  # a heap; who waits no longer is skipped
        self._alone: list[_Place] = []  # the same, of jobs that have to be alone
        self._arrivals = itertools.count()
        self._offered = 0
        self._waiting_choices = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, key: PlacementKey) -> bool:
        return key in self._jobs

    @property
    def offered(self) -> int:
        return self._offered

    @property
    def waiting_choices(self) -> int:
        """Of jobs that need not be alone."""
        return self._waiting_choices

    def all(self) -> list[HeldJob]:
        """A copy, so that jobs may be moved and dropped on the way."""
        return list(self._jobs.values())

    def has(self, held: HeldJob, where: Where) -> bool:
        return held.where is where and self._jobs.get(held.key) is held

    def add(self, held: HeldJob, now: float) -> None:
        """Makes a job wait for a worker; takes the place of what is held of the same attempt."""
        if (before := self._jobs.get(held.key)) is not None:
            self.drop(before)
        held.where, held.since = Where.WAITING, now
        if not held.shape.alone:
            self._waiting_choices += held.shape.choices
        if held.arrived is None:
            held.arrived = now
        self._jobs[held.key] = held
        heapq.heappush(self._alone if held.shape.alone else self._sociable, (held.rank, next(self._arrivals), held))

    def first(self) -> HeldJob | None:
        """The waiting job of the best rank."""
        heads = [head for heap in (self._alone, self._sociable) if (head := self._head(heap)) is not None]
        return min(heads)[-1] if heads else None

    def first_sociable(self) -> HeldJob | None:
        """The waiting job of the best rank of those that need not be alone."""
        head = self._head(self._sociable)
        return None if head is None else head[-1]

    def park(self, held: HeldJob, now: float) -> None:
        """Takes a waiting job out of the order until it is added again."""
        self._leave(held)
        held.where, held.since = Where.PARKED, now

    def offer(self, held: HeldJob, worker_ids: tuple[str, ...], now: float) -> None:
        """Takes a waiting job out of the order."""
        self._leave(held)
        held.where, held.worker_ids, held.since = Where.OFFERED, worker_ids, now
        self._offered += 1

    def drop(self, held: HeldJob) -> None:
        """Holds a job no longer."""
        del self._jobs[held.key]
        self._leave(held)

    def _head(self, waiting: "list[_Place]") -> "_Place | None":
        while waiting and not self.has(waiting[0][-1], Where.WAITING):
            heapq.heappop(waiting)
        return waiting[0] if waiting else None

    def _leave(self, held: HeldJob) -> None:
        self._offered -= held.where is Where.OFFERED
        if held.where is Where.WAITING and not held.shape.alone:
            self._waiting_choices -= held.shape.choices


def _shape(queued: QueuedJob, *, failed: bool) -> JobShape:
    job = queued.job
    return JobShape(
        job.request_id,
        job.prompt_tokens,
        max(1, job.choices),
        split_hashes(job.block_hashes),
        deterministic=job.deterministic,
        kv_format=job.kv_format,
        alone=job.alone,
        failed=failed,
    )
