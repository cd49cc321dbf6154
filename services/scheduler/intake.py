"""Brings one model's jobs from Redis to its dispatcher, and carries out in Redis what the dispatcher decides.

Jobs are taken only while workers have room, so that they wait in Redis and not here: by rank while there are many, and
when the queue is empty each in the moment it comes. Once in a while the queue is
looked after: leases of held jobs are renewed, and entries that dead owners left behind are picked up or closed. While
Redis is away both wait, and what was decided meanwhile is carried out when it is back; the dispatcher goes on without
it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from services.common.channel import cancel_and_wait
from services.common.errors import Unavailable, failures_logged
from services.common.redis.client import ANSWER_TIMEOUT_S
from services.common.redis.keys import PRIORITIES, PRIORITY_NAMES, known_priority
from services.common.redis.queue import JobQueue, QueuedJob
from services.scheduler.dispatch import Dispatcher
from services.scheduler.metrics import SchedulerMetrics

log = logging.getLogger(__name__)

_MOST_JOBS_A_POP = 64
_LONGEST_WAIT_S = 5.0
_LONGEST_BACKOFF_S = 2.0
# What comes so soon after a job is taken together, for less of the CPU than one by one; a little later, too, after
# several jobs. A job that comes within that time waits for its end.
_PAUSE_S, _LONGER_PAUSE_S = 0.002, 0.004


class Intake:
    """One model's way between Redis and its dispatcher."""

    def __init__(
        self,
        model: str,
        queue: JobQueue,
        dispatcher: Dispatcher,
        metrics: SchedulerMetrics,
        *,
        interval_s: float,
    ) -> None:
        self._model = model
        self._queue = queue
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._interval_s = interval_s
        self._arrivals = queue.arrivals(model)
        # More jobs may wait in Redis than the last look there showed.
        self._more = True
        self._removals: list[QueuedJob] = []
        self._releases: list[QueuedJob] = []
        # Each held from the moment jobs are asked for until they are in the dispatcher's hands.
        self._taking = asyncio.Lock()
        self._reclaiming = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._away = False

    def start(self) -> None:
        """Begins to move jobs to the dispatcher whenever it has room, and to look after the queue once per interval."""
        self._tasks = [
            asyncio.create_task(self._repeat(self._take, pause_s=0), name=f"take {self._model}"),
            asyncio.create_task(self._repeat(self._look_after, pause_s=self._interval_s), name=f"look {self._model}"),
            asyncio.create_task(self._watch_room(), name=f"watch {self._model}"),
        ]

    async def stop(self) -> None:
        """Stops both, but not while jobs are on their way: those left to a Redis that does not answer come back."""
        async with contextlib.AsyncExitStack() as held:
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await self._arrivals.interrupt()
                    await held.enter_async_context(self._taking)
                    await held.enter_async_context(self._reclaiming)
            await cancel_and_wait(self._tasks)
        await self._arrivals.close()

    async def settle(self) -> None:
        """Removes and releases what the dispatcher has decided on. What fails is kept for the next time."""
        self._removals += self._dispatcher.take_removals()
        self._releases += self._dispatcher.take_releases()
        await self._queue.remove(self._removals)
        self._removals.clear()
        await self._queue.release(self._releases)
        self._releases.clear()

    async def _take(self) -> None:
        while not (count := self._dispatcher.room(_MOST_JOBS_A_POP)):
            self._dispatcher.wake()  # it may have said otherwise
            await asyncio.sleep(0)
            await self._dispatcher.has_room.wait()
        async with self._taking:
            looks_for_more, self._more = self._more, True  # also if this fails
            if looks_for_more:
                jobs = await self._queue.pop(self._model, count)
                more = len(jobs) == count
            else:
                jobs, more = await self._arrivals.next(max(1, count // len(PRIORITIES)), _LONGEST_WAIT_S)
            self._more = more
            self._dispatcher.hold(jobs)
        if jobs:
            await asyncio.sleep(_PAUSE_S if len(jobs) == 1 else _LONGER_PAUSE_S)

    async def _watch_room(self) -> None:
        """Ends the wait for a job when there is no room for one any more: another scheduler may have some."""
        while True:
            await self._dispatcher.has_no_room.wait()
            with failures_logged(log, "the wait for a job could not be ended"), contextlib.suppress(Unavailable):
                await self._arrivals.end_wait()
            with contextlib.suppress(TimeoutError):  # one that just began may have been missed
                async with asyncio.timeout(self._interval_s):
                    await self._dispatcher.has_room.wait()

    async def _look_after(self) -> None:
        self._dispatcher.expire()
        await self.settle()
        self._dispatcher.lost(await self._queue.renew(self._dispatcher.entries()))
        async with self._reclaiming:
            reclaimed = await self._queue.reclaim(self._model)
            self._dispatcher.hold(reclaimed.jobs)
        for orphan in reclaimed.orphans:
            self._dispatcher.orphaned(orphan)
        for gone in reclaimed.closed:
            log.warning("request %s closed: gateway %s is lost", gone.job.request_id, gone.job.gateway_id)
            self._metrics.gateway_lost.inc()
        for priority, depth in (await self._queue.depths(self._model)).items():
            labels = (self._model, PRIORITY_NAMES[known_priority(priority)])
            self._metrics.queue_depth.labels(*labels).set(depth.jobs)
            self._metrics.queue_age.labels(*labels).set(depth.oldest_s)

    async def _repeat(self, work: Callable[[], Awaitable[None]], *, pause_s: float) -> None:
        backoff_s = 0.1
        while True:
            try:
                await work()
                self._back()
                backoff_s = 0.1
                await asyncio.sleep(pause_s)
            except Unavailable as error:
                self._gone(error)
                await asyncio.sleep(max(backoff_s, pause_s))
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            except Exception:
                log.exception("model %s: the queue's side failed", self._model)
                await asyncio.sleep(_LONGEST_BACKOFF_S)

    def _gone(self, error: Unavailable) -> None:
        if not self._away:
            log.warning("model %s: waiting for Redis: %s", self._model, error)
        self._away = True

    def _back(self) -> None:
        if self._away:
            log.info("model %s: Redis is back", self._model)
        self._away = False
