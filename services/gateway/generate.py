"""The whole life of a request, from its acceptance to its last delta. Read `Generator.generate` first.

Both fronts call it with a validated request and turn its deltas into their own format.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from headrace.v1.scheduler_pb2 import Placement, PlacementRequest
from services.common.errors import DeadlineExceeded, HeadraceError, InvalidRequest, RequestFailed, Unavailable
from services.common.redis.queue import JobQueue
from services.gateway.active_request import ActiveRequest, ActiveRequests, ReceivedOffer
from services.gateway.admission import Admission, seconds_left
from services.gateway.answers.journal import Journal
from services.gateway.answers.leases import Leases
from services.gateway.attempt import FAILURES, REASONS, Attempt
from services.gateway.costs.cost_book import CostBook
from services.gateway.direct import Outlet
from services.gateway.keys.limits import KeyLimits
from services.gateway.links.placement_links import PlacementLinks
from services.gateway.links.witness import Witness
from services.gateway.links.worker_links import Outcome, SequenceFeed, WorkerLinks
from services.gateway.metrics import Metrics, ModelMetrics
from services.gateway.request import Delta, GenerationRequest
from services.gateway.request_log import RequestLog
from services.gateway.time_budget import TimeBudget, now_us
from services.gateway.tracing import RequestSpan, Tracing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adoption:
    """How a request that another gateway left goes on here: its queue entry, its next attempt, whether alone."""

    entry_id: str
    attempt: int
    alone: bool


class Generator:
    """Runs requests."""

    def __init__(
        self,
        *,
        admission: Admission,
        active: ActiveRequests,
        queue: JobQueue,
        leases: Leases,
        limits: KeyLimits,
        costs: CostBook,
        placements: PlacementLinks,
        workers: WorkerLinks,
        metrics: Metrics,
        tracing: Tracing,
        request_log: RequestLog,
        max_attempts: int,
        resume_patience_s: float,
    ) -> None:
        self._admission = admission
        self._active = active
        self._queue = queue
        self._leases = leases
        self._limits = limits
        self._costs = costs
        self._placements = placements
        self._workers = workers
        self._metrics = metrics
        self._tracing = tracing
        self._request_log = request_log
        self._max_attempts = max_attempts
        self._resume_patience_s = resume_patience_s

    async def generate(
        self,
        request: GenerationRequest,
        journal: Journal | None = None,
        adoption: Adoption | None = None,
        outlet: Outlet | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yields the deltas of all choices; the last one carries the usage. Raises HeadraceError.

        A caller that stops iterating cancels the request. However it ends, it ends once: in `_end`. With a journal each
        delta is recorded before it is yielded; with an adoption it holds what another gateway recorded before, which
        comes first. With an outlet, deltas may go there instead, while whoever iterates waits for the next one.
        """
        metrics = self._metrics.for_model(request.model.name)
        span = self._tracing.begin(request)
        try:
            active = await self._admission.admit(request, span.traceparent, journal)
        except HeadraceError as error:
            span.turned_away(error)
            raise
        witness = Witness(active.id, self._placements.tell)
        try:
            metrics.active.inc()
            active.limit(seconds_left(request), _deadline_error(request))
            if adoption is None:
                await self._accept(active)
            else:
                for delta in active.restore():
                    yield delta
                self._adopt(active, adoption)
            while not active.finished:
                placement = await self._place(active, metrics)
                span.placed(placement, active.attempt)
                witness.placed(placement, active.attempt)
                attempt = Attempt.begin(active, placement, self._workers.get(placement.worker_address))
                try:
                    async for delta in attempt.deltas(active, metrics, span, outlet):
                        witness.began()
                        yield delta
                finally:
                    attempt.cancel()
                    attempt.testify(witness, active)
                if not active.finished:
                    self._place_again(active, attempt, metrics)
        except HeadraceError as error:
            active.fail(error)
            await _record_failure(active, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            active.cancelled = True
            raise
        finally:
            self._end(active, metrics, span)

    async def _accept(self, active: ActiveRequest) -> None:
        """It is accepted once Redis has answered."""
        active.entry_id = await self._limits.reserve_and_enqueue(active, self._queue)
        active.budget.spend("admission", now_us())
        if active.journal is not None:
            active.journal.accepted = True

    def _adopt(self, active: ActiveRequest, adoption: Adoption) -> None:
        """Takes over the entry of another gateway's request, and asks for a worker if there is more to come."""
        self._limits.take_over(active)
        active.entry_id, active.attempt, active.job.alone = adoption.entry_id, adoption.attempt, adoption.alone
        self._leases.take_over(active)
        active.budget.spend("admission", now_us())
        if not active.finished:
            self._ask(active, PlacementRequest.REASON_WORKER_LOST)

    async def _place(self, active: ActiveRequest, metrics: ModelMetrics) -> Placement:
        """Waits for an offer. The first one is that of the queue entry, which is this gateway's from then on."""
        offer = await active.next_offer()
        _account_for_wait(active.budget, offer)
        self._placements.forget(active.id)
        if active.begun:
            active.unlimit()
        if active.placed_at is None:
            if offer.offer.queue_entry_id == active.entry_id:  # else it was added again: that one's offer will come
                self._leases.take_over(active)
            active.placed_at = asyncio.get_running_loop().time()
            active.load.placed()
            waited_s = active.placed_at - active.request.caller.arrived
            metrics.queue_time.observe(waited_s)
        active.budget.spend("placement", now_us())
        return active.accept(offer)

    def _place_again(self, active: ActiveRequest, attempt: Attempt, metrics: ModelMetrics) -> None:
        """Asks for another worker after the attempt broke off. Raises if the request must not be tried again."""
        feed = attempt.broken_off
        assert feed is not None and feed.outcome is not None, "an attempt ends finished or broken off"
        worker, outcome = attempt.placement.worker_id, feed.outcome
        if outcome is Outcome.BUSY:
            active.budget.spend("placement", now_us())
        else:
            active.budget.spend_run(feed.times, now_us())
        metrics.resumes[outcome].inc()
        if outcome is not Outcome.BUSY:
            log.info("request %s: attempt %d on %s: %s %s", active.id, active.attempt, worker, outcome, feed.error)
            active.attempt += 1
        if outcome in FAILURES:
            active.failures += 1
            _check_retry(active, feed, self._max_attempts)
            # Whoever ran beside it may be to blame; if it is to blame itself, it takes nobody along again.
            active.job.alone = active.job.alone or active.failures == self._max_attempts - 1 > 0
        self._ask(active, REASONS[outcome], worker)

    def _ask(self, active: ActiveRequest, reason: PlacementRequest.Reason.ValueType, tried_worker_id: str = "") -> None:
        """Asks for a worker, ahead of everything queued."""
        if active.begun:
            patience_s = self._resume_patience_s
            active.limit(
                patience_s, Unavailable(f"The worker was lost, and no other took over within {patience_s:g} s.")
            )
        self._placements.ask(
            PlacementRequest(
                job=active.job,
                attempt=active.attempt,
                queue_entry_id=active.entry_id,
                reason=reason,
                tried_worker_id=tried_worker_id,
            )
        )

    def _end(self, active: ActiveRequest, metrics: ModelMetrics, span: RequestSpan) -> None:
        """Lets go of everything that the request holds, and counts it."""
        active.unlimit()
        active.decline()
        self._placements.forget(active.id)
        if active.abandoned:
            self._leases.release(active)
        elif active.entry_id:
            self._leases.acknowledge(active)
        self._limits.settle(active)
        self._costs.close(active)
        self._active.remove(active)
        active.load.ended(was_placed=active.placed_at is not None)
        metrics.active.dec()
        if active.finished:
            metrics.succeeded.inc()
            outcome = "success"
        elif active.cancelled:
            metrics.cancelled.inc()
            outcome = "cancelled"
        elif active.abandoned:
            metrics.handed_over.inc()
            outcome = "handed_over"
        elif not active.entry_id:  # never accepted
            metrics.refused.inc()
            outcome = "refused"
        else:
            metrics.errored.inc()
            outcome = "error"
        reasons = [choice.finish_reason for choice in active.choices]
        span.end(active.usage(), outcome, active.error, reasons, active.budget)
        self._request_log.ended(active, outcome)


async def _record_failure(active: ActiveRequest, error: HeadraceError) -> None:
    """Records the error that ends an accepted request, unless it goes on elsewhere."""
    if active.journal is not None and active.journal.accepted and not active.abandoned:
        await active.journal.fail(error, active.attempt)


def _account_for_wait(budget: TimeBudget, received: ReceivedOffer) -> None:
    """The offer of a scheduler that did not have the job from the beginning knows nothing of the time before."""
    offer = received.offer
    if offer.HasField("queue_us"):
        budget.spend_away((("placement", offer.placement_us), ("queue", offer.queue_us)), received.received_at)
    else:
        budget.spend("queue", received.received_at)


def _check_retry(active: ActiveRequest, feed: SequenceFeed, max_attempts: int) -> None:
    if feed.invalid_request:
        raise InvalidRequest(feed.error or "The worker cannot run this request.")
    if active.failures >= max_attempts:
        active.given_up = True
        raise RequestFailed(f"The request failed on {active.failures} workers; the last one: {feed.error}.")


def _deadline_error(request: GenerationRequest) -> DeadlineExceeded:
    return DeadlineExceeded(f"The answer did not begin within the request's {request.caller.timeout_s:g} seconds.")
