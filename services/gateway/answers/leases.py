"""Keeps this gateway's claims in Redis alive while requests run, and lets them go when they end.

An entry that was offered is taken over in the background: its request runs meanwhile, since nobody but this gateway
starts it, and the queue would offer it here again. All leases and the gateway's heartbeat are renewed together, and an
entry that Redis no longer has, of a running request or of one that still waits, is added again. An entry is
acknowledged after its request's last event, and again until Redis answers; nobody waits for that but the shutdown.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial

from headrace.v1.job_pb2 import Job
from services.common.errors import HeadraceError, Unavailable, failures_logged
from services.common.redis.dead_letters import DeadLetters
from services.common.redis.queue import LEASE_S, JobQueue, QueuedJob
from services.gateway.active_request import ActiveRequest, ActiveRequests
from services.gateway.answers.recording import stored_request
from services.gateway.errors import AnswerElsewhere, RequestCancelled

log = logging.getLogger(__name__)

_RENEW_EVERY_S = LEASE_S / 3
_RETRY_EVERY_S = 1.0
# Offered entries are taken over so much later, many together, and not at all if they have ended: far within the lease
# that the scheduler has them on until then.
_GATHER_S = 0.05
# So much later ended ones are acknowledged, many together.
_GATHER_ENDED_S = 0.02


class Leases:
    """The queue entries of all active requests."""

    def __init__(
        self, queue: JobQueue, dead_letters: DeadLetters, active: ActiveRequests, *, allow_volatile: bool
    ) -> None:
        self._queue = queue
        self._dead_letters = dead_letters
        self._active = active
        self._allow_volatile = allow_volatile
        self._ending: set[asyncio.Task[None]] = set()
        # Requests with the entries of theirs that are to be taken over, and who does it while there are any.
        self._offered: list[tuple[ActiveRequest, str]] = []
        self._taking_over: asyncio.Task[None] | None = None
        # Entries to acknowledge, with who does it while there are any.
        self._ended: list[tuple[Job, str]] = []
        self._acknowledging: asyncio.Task[None] | None = None
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
            with failures_logged(log, "the leases could not be renewed"):
                await self._renew()
            await asyncio.sleep(_RENEW_EVERY_S)

    def take_over(self, active: ActiveRequest) -> None:
        """Makes the request's entry this gateway's, together with others. While Redis is away, the renewals do that."""
        active.owns_entry = True
        self._offered.append((active, active.entry_id))
        if self._taking_over is None:
            self._taking_over = asyncio.create_task(self._take_over_offered(), name="take over")

    def acknowledge(self, active: ActiveRequest) -> None:
        """Ends the request's entry in the background; if it was given up, keeps it among the dead letters first."""
        if active.given_up:
            self._in_background(self._bury_and_end(active, active.entry_id), f"bury {active.id}")
        else:
            self._end_entry(active.job, active.entry_id)

    def release(self, active: ActiveRequest) -> None:
        """Gives the request's entry up in the background, for another gateway to go on with."""
        self._in_background(self._release(active.job, active.entry_id), f"release {active.id}")

    async def add_again(self, active: ActiveRequest, entry_id: str) -> None:
        """Gives a request whose entry Redis has lost another one, unless it has ended or has another already.

        The new entry's offer starts the request, or hears that it runs: then the entry is this gateway's again.
        """
        if not self._is_current(active, entry_id):
            return
        log.warning("request %s: Redis lost its entry, adding it again", active.id)
        added = await self._queue.enqueue(active.job)
        if self._is_current(active, entry_id):
            active.entry_id, active.owns_entry = added, False
        else:
            self._end_entry(active.job, added)

    async def wait_ended(self, timeout_s: float) -> None:
        """Waits for what is being acknowledged or released."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._ending:  # what ends one way may still have to end the other
                    await asyncio.wait(self._ending)
        except TimeoutError:
            log.warning("ended requests could not be acknowledged in Redis")

    async def _check(self) -> bool:
        try:
            await self._queue.check(allow_volatile=self._allow_volatile)
        except Unavailable as error:
            self._set_problem(error.message)
            return False
        return True

    async def _renew(self) -> None:
        accepted = [active for active in self._active if active.entry_id]
        owned = [(active.job, active.entry_id) for active in accepted if active.owns_entry]
        waiting = [(active.job, active.entry_id) for active in accepted if not active.owns_entry]
        try:
            await asyncio.gather(*(_check_record(active) for active in accepted))
            lost = [*await self._queue.renew(owned), *await self._queue.missing(waiting)]
            await self._add_lost_again(accepted, lost)
        except Unavailable as error:
            self._set_problem(error.message)
        else:
            self._set_problem(None)

    async def _take_over_offered(self) -> None:
        while self._offered:
            await asyncio.sleep(_GATHER_S)
            offered, self._offered = self._offered, []
            running = [active for active, entry_id in offered if self._is_current(active, entry_id)]
            with failures_logged(log, "offered entries could not be taken over"):
                try:
                    lost = await self._queue.take_over([(active.job, active.entry_id) for active in running])
                    await self._add_lost_again(running, lost)
                except Unavailable as error:
                    log.warning("%d requests run without their entries for now: %s", len(running), error.message)
        self._taking_over = None

    async def _add_lost_again(self, requests: Iterable[ActiveRequest], lost: Iterable[tuple[Job, str]]) -> None:
        by_id = {active.id: active for active in requests}
        await asyncio.gather(*(self.add_again(by_id[job.request_id], entry_id) for job, entry_id in lost))

    def _is_current(self, active: ActiveRequest, entry_id: str) -> bool:
        return active in self._active and active.entry_id == entry_id and not active.abandoned

    def _end_entry(self, job: Job, entry_id: str) -> None:
        self._ended.append((job, entry_id))
        if self._acknowledging is None:
            self._acknowledging = self._in_background(self._acknowledge_ended(), "acknowledge")

    def _in_background(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    async def _release(self, job: Job, entry_id: str) -> None:
        try:
            await self._queue.release([QueuedJob(entry_id, job)])
        except Unavailable as error:
            log.warning("request %s: its lease runs out by itself: %s", job.request_id, error.message)

    async def _acknowledge_ended(self) -> None:
        while self._ended:
            await asyncio.sleep(_GATHER_ENDED_S)
            ended, self._ended = self._ended, []
            with failures_logged(log, "ended requests could not be acknowledged"):  # they will be offered again
                await _until_answered(partial(self._queue.acknowledge, ended), f"{len(ended)} ended requests")
        self._acknowledging = None

    async def _bury_and_end(self, active: ActiveRequest, entry_id: str) -> None:
        await _until_answered(lambda: self._bury(active), f"request {active.id}")
        self._end_entry(active.job, entry_id)

    async def _bury(self, active: ActiveRequest) -> None:
        request = stored_request(active.request).SerializeToString()
        await self._dead_letters.add(request, str(active.error), active.failures)

    def _set_problem(self, problem: str | None) -> None:
        if problem != self._problem:
            log.log(logging.INFO if problem is None else logging.WARNING, "Redis: %s", problem or "reachable")
            self._problem = problem


async def _until_answered(work: Callable[[], Awaitable[None]], what: str) -> None:
    failures = 0
    while True:
        try:
            return await work()
        except HeadraceError as error:
            failures += 1
            if failures == 1:
                log.warning("%s: not acknowledged yet: %s", what, error.message)
        await asyncio.sleep(_RETRY_EVERY_S)


async def _check_record(active: ActiveRequest) -> None:
    """Finds out whether a recorded request is still this gateway's, and still wanted. Raises Unavailable."""
    if active.journal is None or not active.journal.accepted:
        return
    try:
        await active.journal.check()
    except AnswerElsewhere as error:
        active.abandon(error)
    except RequestCancelled as error:
        active.fail(error)
