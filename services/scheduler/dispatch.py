"""Gives one model's jobs to its workers: places the first in rank, offers it to its gateway, hears the answer.

Knows no Redis: `intake.py` brings jobs from the queue and carries out what is decided here about their entries.

A job's deadline is its gateway's affair, which withdraws the entry: two machines' clocks may differ.

Nobody overtakes: while the first job fits no worker, the others wait, so that small jobs do not starve a large one. But
for one that waits to be alone: the others go on without the worker that is kept for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headrace.v1 import scheduler_pb2
from headrace.v1.job_pb2 import Job
from services.common.redis.queue import FIRST_ATTEMPT, QueuedJob
from services.common.tracing import Tracer, is_recorded
from services.scheduler.fleet import Clock, Fleet
from services.scheduler.gateways import GatewayKey, Gateways, GatewaySession
from services.scheduler.held import HeldJob, HeldJobs, Where
from services.scheduler.index import IndexUnion
from services.scheduler.kv_plans import Candidate
from services.scheduler.kv_sources import kv_sources
from services.scheduler.metrics import RequestMetrics, SchedulerMetrics
from services.scheduler.placement import Choice, Policy, impossible, kept, place

log = logging.getLogger(__name__)

Answer = scheduler_pb2.OfferAnswer


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `lease_s`: to answer an offer, or to come back; `patience_s`: for a worker to serve the model again;
    `share_s`: until a job that fits no share of a worker may take what is granted to other schedulers.
    """

    lease_s: float
    patience_s: float
    share_s: float = 1.0


class Dispatcher:
    """The jobs of one model, between the queue, the gateways and the fleet."""

    def __init__(
        self,
        model: str,
        scheduler_id: str,
        fleet: Fleet,
        gateways: Gateways,
        index: Callable[[], IndexUnion],
        metrics: SchedulerMetrics,
        timing: Timing,
        policy: Policy = "kv_aware",
        clock: Clock = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        self._model = model
        self._scheduler_id = scheduler_id
        self._fleet = fleet
        self._gateways = gateways
        self._index = index
        self._metrics = metrics
        self._counts = RequestMetrics(metrics, model)
        self._timing = timing
        self._policy: Policy = policy
        self._placed = 0
        self._kept = ""
        """The worker that others do not get, since a job waits to be alone on it; as `place_waiting` found it."""
        self._clock = clock
        self._tracer = tracer or Tracer()
        self._held = HeldJobs()
        self._wake = asyncio.Event()
        self._to_remove: list[QueuedJob] = []
        self._to_release: list[QueuedJob] = []
        self.has_room, self.has_no_room = asyncio.Event(), asyncio.Event()
        """One of them is set, as the last look at the waiting jobs found it; none before the first one."""
        self.all_answered = asyncio.Event()
        """Set while no offer waits for its answer."""
        self.all_answered.set()

    async def run(self) -> None:
        """Places jobs whenever something has changed. Runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for look in (self.place_waiting, self._look_for_room):
                try:
                    look()
                except Exception:
                    first = self._held.first()
                    log.exception("placing failed at request %s", first.key[0] if first else "-")

    def wake(self) -> None:
        """Something has changed: look at the waiting jobs again."""
        self._wake.set()

    @property
    def held_jobs(self) -> int:
        return len(self._held)

    # --- what comes in

    def hold(self, jobs: Iterable[QueuedJob]) -> None:
        """Takes jobs from the queue. One that is held already stays as it is."""
        for queued in jobs:
            if (queued.job.request_id, FIRST_ATTEMPT) not in self._held:
                self._held.add(HeldJob.from_queue(queued), self._clock())
        self.wake()

    def request(self, request: scheduler_pb2.PlacementRequest) -> None:
        """Takes a request that its gateway wants placed again. The newest word on an attempt counts."""
        held = HeldJob.from_request(request)
        held.tried_reports = self._fleet.reports(held.tried_worker_id)
        self._held.add(held, self._clock())
        self.wake()

    def gateway_connected(self, gateway: GatewayKey) -> None:
        """Goes on with the jobs whose gateway was missing."""
        for held in self._held.all():
            if held.where is Where.PARKED and held.gateway == gateway:
                self._held.add(held, self._clock())
        self.wake()

    def orphaned(self, queued: QueuedJob) -> None:
        """Offers a job of a dead gateway to another one, which takes its entry over; else its lease runs out."""
        if (session := self._gateways.any()) is not None:
            log.info("request %s: offered to gateway %s for adoption", queued.job.request_id, session.key[0])
            session.offer_adoption(queued.job, queued.entry_id)
            self._metrics.orphans.inc()

    # --- what the queue's side asks

    def room(self, most: int) -> int:
        """How many more jobs could be placed now, as far as `most`."""
        waiting = self._held.waiting_choices
        return max(0, self._fleet.room(self._model, waiting + most, but_on=self._kept) - waiting)

    def entries(self) -> list[tuple[Job, str]]:
        """The queue entries that this scheduler owns."""
        return [(held.queued.job, held.queued.entry_id) for held in self._held.all() if not held.replaces]

    def lost(self, entries: Iterable[tuple[Job, str]]) -> None:
        """Forgets jobs whose entries are somebody else's now. One that is offered may be its gateway's already: its
        answer is on the way.
        """
        gone = {job.request_id for job, _ in entries}
        for held in self._held.all():
            if held.key[0] in gone and not held.replaces and held.where is not Where.OFFERED:
                self._drop(held)

    def take_removals(self) -> list[QueuedJob]:
        """Entries to remove from the queue; the caller does it."""
        removals, self._to_remove = self._to_remove, []
        return removals

    def take_releases(self) -> list[QueuedJob]:
        """Entries to give up for whoever reclaims next; the caller does it."""
        releases, self._to_release = self._to_release, []
        return releases

    # --- time

    def expire(self) -> None:
        """Gives up what has taken too long; to be called about once a second."""
        now = self._clock()
        serves = self._fleet.serves(self._model)
        for held in self._held.all():
            waited_s = now - held.since
            if held.where is Where.OFFERED and waited_s > self._timing.lease_s:
                self._unanswered(held)
            elif held.where is Where.PARKED and waited_s > self._timing.lease_s:
                self._give_up(held)
            elif held.replaces and not serves and waited_s >= self._timing.patience_s:
                self._refuse(held, f"No worker serves {self._model} any more.", permanent=False)
        self._observe()
        self.wake()  # time alone makes an unreported placement stop counting against its worker

    def drain(self) -> None:
        """Gives up everything that has not been offered."""
        for held in self._held.all():
            if held.where is not Where.OFFERED:
                self._give_up(held)

    def give_up_offers(self) -> None:
        """Gives up what has been offered and not answered."""
        for held in self._held.all():
            if held.where is Where.OFFERED:
                self._unanswered(held)

    # --- placing

    def place_waiting(self) -> None:
        """Offers waiting jobs in the order of their rank, until one fits nowhere. If that one waits to be alone, those
        that need not be go on without the worker that is kept for it.
        """
        self._kept = ""
        while (held := self._held.first()) is not None and self._settle_first(held):
            pass
        if held is not None and held.shape.alone:
            self._kept = kept(held.shape, self._fleet.candidates(self._model))
            while (other := self._held.first_sociable()) is not None and self._settle_first(other):
                pass

    def _look_for_room(self) -> None:
        now_set, now_clear = self.has_room, self.has_no_room
        if not self.room(1):
            now_set, now_clear = now_clear, now_set
        now_set.set()
        now_clear.clear()

    def _settle_first(self, held: HeldJob) -> bool:
        """Moves the first job on. False: it has to wait, and all others with it."""
        session = self._gateways.find(held.gateway)
        if session is not None:
            return self._place(held, session)
        elif held.replaces:
            self._drop(held)  # the gateway asks another scheduler
        else:
            self._held.park(held, self._clock())
        return True

    def _place(self, held: HeldJob, session: GatewaySession) -> bool:
        began = self._clock()
        workers = self._fleet.candidates(self._model)
        if reason := impossible(held.shape, workers):
            # It is no mistake of its caller's if it has run already or fits a worker that has left: that one is away.
            fits_none = impossible(held.shape, [*workers, *self._fleet.left(self._model)]) is not None
            self._refuse(held, reason, permanent=fits_none and held.attempt == FIRST_ATTEMPT)
            return True
        choice = place(
            held.shape,
            self._open_to(held, workers),
            self._index(),
            avoid=held.tried_worker_id,
            beyond_share=began - held.since >= self._timing.share_s,
            policy=self._policy,
            turn=self._placed,
        )
        if choice is None:
            return False
        self._offer(held, choice, session, began)
        return True

    def _open_to(self, held: HeldJob, workers: list[Candidate]) -> list[Candidate]:
        """Without the worker that is kept from it, and without the one on which the job failed, until it reports again:
        what is known of it is out of date.
        """
        closed = {self._kept}
        if held.tried_reports is not None and self._fleet.reports(held.tried_worker_id) == held.tried_reports:
            closed.add(held.tried_worker_id)
        return [worker for worker in workers if worker.id not in closed]

    def _offer(self, held: HeldJob, choice: Choice, session: GatewaySession, began: float) -> None:
        """`began`: when this job's placement did."""
        worker = choice.worker
        self._placed += 1
        costs = choice.costs()
        for worker_id, cost in costs.items():
            self._fleet.reserve(worker_id, held.key, cost, alone=held.shape.alone)
        self._held.offer(held, tuple(costs), self._clock())
        self.all_answered.clear()
        placement = scheduler_pb2.Placement(
            worker_id=worker.id,
            worker_incarnation=worker.incarnation,
            worker_address=self._fleet.address(worker.id),
            expected_hit_tokens=choice.plan.hit_tokens,
            scheduler_id=self._scheduler_id,
            kv_sources=kv_sources(choice.plan, held.shape, self._index(), self._fleet),
            kv_format=worker.kv_format,
            watched=self._fleet.suspects(worker.id),
            probe=worker.probe,
        )
        offer = scheduler_pb2.Offer(
            request_id=held.key[0],
            attempt=held.attempt,
            queue_entry_id=held.queued.entry_id,
            placement=placement,
            queue_us=held.queued_us(began),
            placement_us=int((self._clock() - began) * 1e6),
        )
        if is_recorded(held.queued.job.traceparent):
            self._record(held, choice, began)
        session.offer(offer, lambda status: self._answered(held, status))
        (self._counts.replaced if held.replaces else self._counts.placed[choice.reason]).inc()

    def _record(self, held: HeldJob, choice: Choice, began: float) -> None:
        """Records, as spans, how long a job has waited, and how it was placed."""
        parent, attempt = held.queued.job.traceparent, {"headrace.attempt": held.attempt}
        if (queued_us := held.queued_us(began)) is not None:
            self._tracer.record("queue", parent, began - queued_us / 1e6, began, attempt)
        attributes = {
            **attempt,
            "headrace.worker": choice.worker.id,
            "headrace.placement.reason": "replaced" if held.replaces else choice.reason,
            "headrace.placement.expected_hit_tokens": choice.plan.hit_tokens,
        }
        self._tracer.record("place", parent, began, self._clock(), attributes)

    # --- answers

    def _answered(self, held: HeldJob, status: Answer.Status.ValueType) -> None:
        if not self._held.has(held, Where.OFFERED):
            return
        if status == Answer.STATUS_ACCEPTED:
            self._accepted(held)
            return
        self._settle(held)
        if status == Answer.STATUS_RUNNING:
            self._metrics.offers.labels("running").inc()
            self._drop(held)
        else:
            self._metrics.offers.labels("gone").inc()
            self._remove(held)

    def _accepted(self, held: HeldJob) -> None:
        self._counts.accepted.inc()
        if not held.replaces:
            offered = time.time() - (self._clock() - held.since)
            waited_s = offered - held.queued.job.enqueued_unix_ms / 1000
            self._counts.queue_wait.observe(max(0.0, waited_s))
        self._forget(held)  # what it takes is counted against its worker: no other job has more room for it

    def _unanswered(self, held: HeldJob) -> None:
        log.warning("request %s: gateway %s did not answer an offer", held.key[0], held.gateway[0])
        self._metrics.offers.labels("none").inc()
        if session := self._gateways.find(held.gateway):
            session.withdraw(*held.key)
        self._settle(held)
        self._give_up(held)

    def _settle(self, held: HeldJob) -> None:
        """The offer comes to nothing: no worker will hear of it."""
        for worker_id in held.worker_ids:
            self._fleet.settle(worker_id, held.key)

    # --- letting go

    def _refuse(self, held: HeldJob, reason: str, *, permanent: bool) -> None:
        log.warning("request %s refused: %s", held.key[0], reason)
        self._metrics.refusals.inc()
        if session := self._gateways.find(held.gateway):
            session.refuse(*held.key, reason, permanent=permanent)
        self._remove(held)

    def _remove(self, held: HeldJob) -> None:
        """Ends a job: its gateway does not want it, or cannot have it."""
        if not held.replaces:
            self._to_remove.append(held.queued)
        self._drop(held)

    def _give_up(self, held: HeldJob) -> None:
        """Leaves a job to whoever reclaims its entry; if its gateway is dead, it is closed then."""
        if not held.replaces:
            self._to_release.append(held.queued)
        self._drop(held)

    def _drop(self, held: HeldJob) -> None:
        self._forget(held)
        self.wake()

    def _forget(self, held: HeldJob) -> None:
        self._held.drop(held)
        if not self._held.offered:
            self.all_answered.set()

    def _observe(self) -> None:
        self._metrics.held_jobs.labels(self._model).set(len(self._held))
        for condition, count in self._fleet.count_conditions(self._model).items():
            self._metrics.workers.labels(self._model, condition).set(count)
