"""Keeps this gateway's claims in Redis alive while requests run, and lets them go when they end.

All leases and the gateway's heartbeat are renewed together. An entry is acknowledged after its request's last event,
and again until Redis answers; nobody waits for that but the shutdown.
"""

import asyncio
import logging

from headrace.v1.job_pb2 import Job
from services.common.errors import HeadraceError, Unavailable
from services.common.redis.queue import LEASE_S, JobQueue
from services.gateway.active_request import ActiveRequest, ActiveRequests

log = logging.getLogger(__name__)

_RENEW_EVERY_S = LEASE_S / 3
_RETRY_EVERY_S = 1.0


class Leases:
    """The queue entries of all active requests."""

    def __init__(self, queue: JobQueue, active: ActiveRequests, *, allow_volatile: bool) -> None:
        self._queue = queue
        self._active = active
        self._allow_volatile = allow_volatile
        self._acknowledging: set[asyncio.Task[None]] = set()
        self._problem: str | None = "Redis has not answered yet."

    @property
    def problem(self) -> str | None:
        """Why no request can be accepted now, or None."""
        return self._problem

    async def run(self) -> None:
        """Checks Redis once, then renews until cancelled. Raises UnfitRedis for a Redis that must not be used."""
        checked = False
        while not checked:
            checked = await self._check()
            await asyncio.sleep(0 if checked else _RETRY_EVERY_S)
        while True:
            try:
                await self._renew()
            except Exception:
                log.exception("the leases could not be renewed")
            await asyncio.sleep(_RENEW_EVERY_S)

    def acknowledge(self, active: ActiveRequest) -> None:
        """Ends the request's entry in the background."""
        task = asyncio.create_task(self._acknowledge(active.job, active.entry_id), name=f"acknowledge {active.id}")
        self._acknowledging.add(task)
        task.add_done_callback(self._acknowledging.discard)

    async def wait_acknowledged(self, timeout_s: float) -> None:
        """Waits for what is being acknowledged."""
        if self._acknowledging:
            _done, pending = await asyncio.wait(self._acknowledging, timeout=timeout_s)
            if pending:
                log.warning("%d ended requests could not be acknowledged in Redis", len(pending))

    async def _check(self) -> bool:
        try:
            await self._queue.check(allow_volatile=self._allow_volatile)
        except Unavailable as error:
            self._set_problem(error.message)
            return False
        return True

    async def _renew(self) -> None:
        owned = [(active.job, active.entry_id) for active in self._active if active.owns_entry]
        try:
            for job, _entry_id in await self._queue.renew(owned):
                await self._add_again(job)
        except Unavailable as error:
            self._set_problem(error.message)
        else:
            self._set_problem(None)

    async def _add_again(self, job: Job) -> None:
        """Puts back a running request that Redis forgot. Its offer is answered `running`, and it is ours again."""
        active = self._active.get(job.request_id)
        if active is None:  # it has ended meanwhile
            return
        log.warning("request %s: Redis lost its entry, adding it again", active.id)
        active.owns_entry = False
        active.entry_id = await self._queue.enqueue(active.job)

    async def _acknowledge(self, job: Job, entry_id: str) -> None:
        failures = 0
        while True:
            try:
                await self._queue.acknowledge(job, entry_id)
                return
            except HeadraceError as error:
                failures += 1
                if failures == 1:
                    log.warning("request %s: not acknowledged yet: %s", job.request_id, error.message)
            await asyncio.sleep(_RETRY_EVERY_S)

    def _set_problem(self, problem: str | None) -> None:
        if problem != self._problem:
            log.log(logging.INFO if problem is None else logging.WARNING, "Redis: %s", problem or "reachable")
            self._problem = problem
