"""Requests that are accepted and not ended: the changing state of each, and the register of all."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headrace.v1.job_pb2 import Job
from headrace.v1.scheduler_pb2 import Offer, OfferAnswer, Placement
from services.common.errors import HeadraceError
from services.common.redis.queue import FIRST_ATTEMPT
from services.gateway.answers.journal import Journal
from services.gateway.answers.recording import event_of, new_choices, replay
from services.gateway.costs.spending import Spending
from services.gateway.errors import AnswerElsewhere
from services.gateway.request import Delta, GenerationRequest, Usage
from services.gateway.shedder import ModelLoad
from services.gateway.time_budget import TimeBudget, now_us


@dataclass(slots=True)
class ReceivedOffer:
    """An offer and the way back to the scheduler that made it. It is answered exactly once."""

    offer: Offer
    send: Callable[[OfferAnswer], None]
    answered: bool = False
    received_at: int = field(default_factory=now_us)

    def answer(self, status: OfferAnswer.Status.ValueType) -> None:
        if not self.answered:
            self.answered = True
            self.send(OfferAnswer(request_id=self.offer.request_id, attempt=self.offer.attempt, status=status))


class ActiveRequest:
    """One request between its acceptance and its end. Owned by its `generate`; others only bring news."""

    def __init__(self, request: GenerationRequest, job: Job, load: ModelLoad, journal: Journal | None = None) -> None:
        self.request = request
        self.job = job
        # Where its answer is recorded, if it is.
        self.journal = journal
        # Where it counts as waiting until it is placed, and as running from then on.
        self.load = load
        self.budget = TimeBudget(int(request.caller.arrived * 1e6))
        self.budget.spend("gateway", now_us())
        self.entry_id = ""
        # The entry is ours and its lease ours to renew.
        self.owns_entry = False
        self.attempt = FIRST_ATTEMPT
        # Attempts that ended by a lost worker or an engine error.
        self.failures = 0
        self.cached_prompt_tokens: int | None = None
        # Loop time of the first placement; None while queued.
        self.placed_at: float | None = None
        # Loop time of the first token; None before.
        self.first_token_at: float | None = None
        # Of the newest attempt; empty while queued.
        self.worker_id = ""
        self.choices = new_choices(request.model, request)
        self.spending = Spending()
        # Tokens of the newest attempt that wait to be read.
        self.count_unread: Callable[[], int] = lambda: 0
        # Set when there is an offer, tokens, an end or an error to look at.
        self.news = asyncio.Event()
        # Its task waits for news, or is about to look at some: all that it has made of the news before is delivered.
        self.waiting = False
        self.error: HeadraceError | None = None
        # Its caller has gone.
        self.cancelled = False
        # Another gateway goes on with it: its end here is not its end.
        self.abandoned = False
        # It has failed as often as it may.
        self.given_up = False
        self._wants_offer = True
        self._offer: ReceivedOffer | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def id(self) -> str:
        return self.job.request_id

    @property
    def finished(self) -> bool:
        for choice in self.choices:  # no generator: this is asked for with each token
            if not choice.finish_reason:
                return False
        return True

    @property
    def begun(self) -> bool:
        """Whether a token has been seen."""
        for choice in self.choices:
            if choice.token_ids:
                return True
        return False

    def usage(self) -> Usage:
        """What has been produced so far, also of what nobody has read."""
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices) + self.count_unread(),
            cached_prompt_tokens=self.cached_prompt_tokens or 0,
            cost_nanos=self.spending.costs.nanos if self.spending.priced else None,
        )

    def fail(self, error: HeadraceError) -> None:
        """Ends the request with an error at its next look at the news. The first error counts."""
        self.error = self.error or error
        self.news.set()

    def abandon(self, error: HeadraceError) -> None:
        """Leaves the request to another gateway."""
        self.abandoned = True
        self.fail(error)

    async def record(self, delta: Delta) -> None:
        """Records a delta. Raises what ends the request here."""
        assert self.journal is not None, "this answer is recorded"
        event = event_of(delta)
        if not self.journal.events:
            event.cached_prompt_tokens = self.cached_prompt_tokens or 0
            event.kv_format = self.job.kv_format
        delta.position = len(self.journal.events)
        try:
            await self.journal.record(event, self.attempt)
        except AnswerElsewhere as error:
            self.abandon(error)
            raise

    def restore(self) -> list[Delta]:
        """Takes what another gateway has recorded of the answer, and returns it."""
        events = self.journal.events if self.journal else []
        if events:
            self.cached_prompt_tokens = events[0].cached_prompt_tokens
            self.job.kv_format = events[0].kv_format
        return [replay(self.choices, event, position) for position, event in enumerate(events)]

    def limit(self, seconds: float, error: HeadraceError) -> None:
        """Fails with `error` in `seconds`, unless `unlimit` comes first. Replaces an earlier limit."""
        self.unlimit()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def unlimit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def receive(self, offer: ReceivedOffer) -> None:
        """Takes an offer if one is wanted and it is for the current attempt; else answers that the job runs."""
        if self._wants_offer and self._offer is None and offer.offer.attempt == self.attempt:
            self._offer = offer
            self.news.set()
            return
        if offer.offer.queue_entry_id == self.entry_id:
            self.owns_entry = True  # an entry that was added again: the next renewal takes it from the scheduler
        offer.answer(OfferAnswer.STATUS_RUNNING)

    def refuse(self, attempt: int, error: HeadraceError) -> None:
        """Fails if a placement of that attempt is what this request waits for."""
        if self._wants_offer and attempt == self.attempt:
            self.fail(error)

    async def next_offer(self) -> ReceivedOffer:
        """Waits for an offer. Raises the request's error."""
        self._wants_offer = True
        while self._offer is None:
            await self.look_at_news()
        return self._offer

    def accept(self, offer: ReceivedOffer) -> Placement:
        """Answers that the job starts here; later offers hear that it runs."""
        offer.answer(OfferAnswer.STATUS_ACCEPTED)
        self._wants_offer, self._offer = False, None
        placement = offer.offer.placement
        self.worker_id = placement.worker_id
        if self.job.deterministic:  # it goes on only where its tokens come out alike
            self.job.kv_format = placement.kv_format
        return placement

    def decline(self) -> None:
        """Answers a waiting offer that the job is gone."""
        if self._offer is not None:
            self._offer.answer(OfferAnswer.STATUS_GONE)
            self._offer = None

    async def look_at_news(self) -> None:
        """Waits until something has come. Raises the request's error."""
        self.waiting = True
        try:
            await self.news.wait()
        finally:
            self.waiting = False
        self.news.clear()
        if self.error is not None:
            raise self.error


class ActiveRequests:
    """All requests that this gateway has accepted and not ended."""

    def __init__(self) -> None:
        self._by_id: dict[str, ActiveRequest] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[ActiveRequest]:
        return iter(list(self._by_id.values()))

    def __contains__(self, active: ActiveRequest) -> bool:
        return self._by_id.get(active.id) is active

    def get(self, request_id: str) -> ActiveRequest | None:
        return self._by_id.get(request_id)

    def add(self, active: ActiveRequest) -> None:
        self._by_id[active.id] = active
        self._empty.clear()

    def remove(self, active: ActiveRequest) -> None:
        del self._by_id[active.id]
        if not self._by_id:
            self._empty.set()

    async def wait_empty(self, timeout_s: float) -> bool:
        """Waits until every request has ended. False: some have not within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
