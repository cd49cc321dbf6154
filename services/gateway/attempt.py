"""One run of a request on a worker: what starts it, the deltas it brings, and how it ended."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from headrace.v1.sampling_pb2 import Stopping
from headrace.v1.scheduler_pb2 import Placement, PlacementRequest
from headrace.v1.worker_pb2 import Start
from services.gateway.active_request import ActiveRequest
from services.gateway.direct import DirectDelivery, Outlet
from services.gateway.links.witness import Witness
from services.gateway.links.worker_links import Outcome, SequenceFeed, WorkerLink
from services.gateway.metrics import ModelMetrics
from services.gateway.request import Delta, pack_ids
from services.gateway.text.choice import Choice
from services.gateway.time_budget import TimeBudget, now_us
from services.gateway.tracing import RequestSpan

REASONS = {
    Outcome.BUSY: PlacementRequest.REASON_BUSY,
    Outcome.DRAINING: PlacementRequest.REASON_DRAINING,
    Outcome.LOST: PlacementRequest.REASON_WORKER_LOST,
    Outcome.STALLED: PlacementRequest.REASON_WORKER_LOST,
    Outcome.FAILED: PlacementRequest.REASON_WORKER_LOST,
}
FAILURES = (Outcome.LOST, Outcome.STALLED, Outcome.FAILED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a request on a worker: the choices that still ran when it began, each with its feed."""

    placement: Placement
    link: WorkerLink
    sequences: list[tuple[Choice, SequenceFeed]]

    @classmethod
    def begin(cls, active: ActiveRequest, placement: Placement, link: WorkerLink) -> "Attempt":
        """Starts every choice that is not finished, each after the tokens it has."""
        choices = [choice for choice in active.choices if not choice.finished]
        feeds = link.start(
            _start_command(active, placement),
            [(choice.index, choice.delivered_ids()) for choice in choices],
            active.news,
            active.spending,
        )
        attempt = cls(placement, link, list(zip(choices, feeds, strict=True)))
        active.count_unread = attempt.unread_tokens
        return attempt

    @property
    def broken_off(self) -> SequenceFeed | None:
        """A sequence that ended and has to go on elsewhere; then the whole attempt is over."""
        for _, feed in self.sequences:  # no generator: this is asked for with each token
            if feed.outcome is not None and feed.outcome in REASONS:
                return feed
        return None

    def unread_tokens(self) -> int:
        """What its worker has sent and its caller has not taken: that was computed, too."""
        return sum(min(len(feed.token_ids), choice.room) for choice, feed in self.sequences if not choice.finished)

    def cancel(self) -> None:
        self.link.cancel(feed for _, feed in self.sequences)

    def testify(self, witness: Witness, active: ActiveRequest) -> None:
        """Says how it has ended, of which its caller's mistakes and cancellations say nothing."""
        feed = self.broken_off
        if active.finished:
            witness.finished()
        elif feed is not None and feed.outcome in FAILURES and not feed.invalid_request:
            witness.failed(stalled=feed.outcome is Outcome.STALLED)
        else:
            witness.withdrawn()

    async def deltas(
        self, active: ActiveRequest, metrics: ModelMetrics, span: RequestSpan, outlet: Outlet | None
    ) -> AsyncGenerator[Delta, None]:
        """Its deltas, until every choice is finished or the attempt breaks off; but for those that the outlet takes."""
        while not active.finished and self.broken_off is None:
            await active.look_at_news()
            now = time.monotonic()
            for choice, feed in self.sequences:
                if choice.finished or not (feed.token_ids or feed.outcome is Outcome.FINISHED):
                    continue
                if not active.begun:
                    _first_token(active, feed, now, metrics, span)
                elif choice.last_token_at and feed.token_ids:  # another gateway's last token came at no time of ours
                    metrics.inter_token_latency.observe(
                        (now - choice.last_token_at) / len(feed.token_ids), len(feed.token_ids)
                    )
                choice.last_token_at = now
                logprobs = None if feed.logprobs is None else feed.take_logprobs()
                delta = choice.advance(feed.take_tokens(), feed.finish_reason, logprobs)
                metrics.tokens.inc(len(delta.token_ids))
                if delta.finish_reason:
                    self.link.cancel((feed,))  # a stop string ends it before its worker knows
                    if active.finished:
                        if await active.spending.told():
                            now = asyncio.get_running_loop().time()
                        delta.usage = active.usage()
                if active.journal is not None:
                    await active.record(delta)
                if delta.usage is not None:
                    delta.timings = _close_budget(active.budget, feed, looked_at=int(now * 1e6))
                    metrics.spent(delta.timings, span.exemplar)
                yield delta
                if outlet is not None and feed.direct is None and active.journal is None and choice.plain:
                    feed.direct = DirectDelivery(active, choice, outlet, metrics)


def _start_command(active: ActiveRequest, placement: Placement) -> Start:
    request = active.request
    stopping = Stopping()
    stopping.CopyFrom(request.stopping)
    del stopping.stop[:]  # the gateway matches stop strings
    return Start(
        request_id=active.id,
        attempt=active.attempt,
        prompt_ids=pack_ids(request.prompt_ids),
        sampling=request.sampling,
        stopping=stopping,
        cache_salt=request.cache_salt,
        scheduler_id=placement.scheduler_id,
        kv_sources=placement.kv_sources,
        traceparent=active.job.traceparent,
        alone=active.job.alone,
    )


def _first_token(
    active: ActiveRequest, feed: SequenceFeed, now: float, metrics: ModelMetrics, span: RequestSpan
) -> None:
    """The answer begins: the deadline no longer applies."""
    active.unlimit()
    active.first_token_at = now
    # No worker can make a prompt cheaper than one that was cached whole.
    active.cached_prompt_tokens = min(max(0, feed.cached_prompt_tokens or 0), len(active.request.prompt_ids))
    waited_s = now - active.request.caller.arrived
    if active.placed_at is not None:
        active.load.began(now - active.placed_at)
    metrics.time_to_first_token.observe(waited_s)
    metrics.prompt_tokens.inc(len(active.request.prompt_ids))
    metrics.cached_prompt_tokens.inc(active.cached_prompt_tokens)
    span.first_token()


def _close_budget(budget: TimeBudget, feed: SequenceFeed, *, looked_at: int) -> TimeBudget:
    """The last delta is made; of several choices those count that end last."""
    budget.spend_run(feed.times, looked_at)
    budget.spend("detokenize", now_us())
    return budget
