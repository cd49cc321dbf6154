"""The record of one answer that this gateway runs: every delta is in Redis before the caller sees it.

While Redis is away the answer goes on unrecorded, and what is missing is added when Redis is back: only if this gateway
dies in that time, too, is it lost.
"""

import asyncio
import logging
from collections.abc import Sequence

from headrace.v1.answer_pb2 import AnswerEvent, StoredRequest
from services.common.errors import HeadraceError, Unavailable
from services.common.redis.answers import AnswerStore, Standing, State
from services.gateway.answers.recording import Recording, error_event_of
from services.gateway.errors import AnswerElsewhere, RequestCancelled

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 256
_RETRY_EVERY_S = 1.0


class Journal:
    """What is recorded of an answer, and how much of it Redis has."""

    def __init__(self, store: AnswerStore, recording: Recording, request: StoredRequest) -> None:
        self.answer_id = recording.answer_id
        self.accepted = False
        """The request is in the queue: from here on it ends in an event."""
        self.events: list[AnswerEvent] = []
        self._store = store
        self._fingerprint = recording.fingerprint
        self._request = request.SerializeToString()
        self._kept = 0
        self._attempt = 0
        self._state = State.OPEN
        self._catching_up: asyncio.Task[None] | None = None

    @classmethod
    def adopted(
        cls, store: AnswerStore, recording: Recording, request: StoredRequest, events: Sequence[AnswerEvent]
    ) -> "Journal":
        """Of an answer that another gateway began, with the events it left."""
        journal = cls(store, recording, request)
        journal.events = list(events)
        journal._kept = len(events)
        journal.accepted = True
        return journal

    async def open(self) -> bytes | None:
        """Begins the record. If there is one of that id, returns its fingerprint and does nothing."""
        return await self._store.open(self.answer_id, self._request, self._fingerprint)

    async def discard(self, error: HeadraceError) -> None:
        """Ends the record of a request that was not accepted. Those who read it already get the error."""
        try:
            await self._store.discard(self.answer_id, error_event_of(error).SerializeToString())
        except Unavailable as away:
            log.warning("answer %s: not discarded: %s", self.answer_id, away.message)

    async def record(self, event: AnswerEvent, attempt: int) -> None:
        """Adds an event, and waits until Redis has it. Raises AnswerElsewhere or RequestCancelled."""
        self.events.append(event)
        self._attempt = attempt
        if event.HasField("usage"):
            self._state = State.DONE
        await self._keep_or_catch_up()

    async def fail(self, error: HeadraceError, attempt: int | None = None) -> None:
        """Adds the error that the answer ends in, by default in its newest attempt, unless it has ended before."""
        if self._state is State.OPEN:
            self.events.append(error_event_of(error))
            self._attempt = self._attempt if attempt is None else attempt
            self._state = State.FAILED
        try:
            await self._keep_or_catch_up()
        except (AnswerElsewhere, RequestCancelled) as standing:
            log.info("answer %s: %s", self.answer_id, standing.message)

    async def check(self) -> None:
        """Keeps the answer from being forgotten. Raises AnswerElsewhere, RequestCancelled or Unavailable."""
        standing, _ = await self._store.append(self.answer_id, self._kept, ())
        self._look_at(standing)

    async def settled(self) -> None:
        """Waits until Redis has every event, for as long as that takes."""
        if self._catching_up is not None:
            await self._catching_up

    async def _keep_or_catch_up(self) -> None:
        if self._catching_up is not None and not self._catching_up.done():
            return
        try:
            await self._keep()
        except Unavailable as error:
            log.warning("answer %s: goes on unrecorded for now: %s", self.answer_id, error.message)
            self._catching_up = asyncio.create_task(self._catch_up(), name=f"record {self.answer_id}")

    async def _keep(self) -> None:
        """Adds what Redis does not have yet. What an answer lost on its way has added is not added twice."""
        while self._kept < len(self.events):
            batch = self.events[self._kept : self._kept + _MOST_AT_ONCE]
            standing, self._kept = await self._store.append(
                self.answer_id,
                self._kept,
                [event.SerializeToString() for event in batch],
                attempt=self._attempt,
                state=self._state if self._kept + len(batch) == len(self.events) else State.OPEN,
            )
            if standing is Standing.GONE:
                await self.open()
            self._look_at(standing)

    def _look_at(self, standing: Standing) -> None:
        if standing is Standing.LOST:
            raise AnswerElsewhere("This answer goes on on another gateway: continue it from its last event.")
        if standing is Standing.CANCELLED and self._state is State.OPEN:
            raise RequestCancelled("The request was cancelled.")

    async def _catch_up(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_EVERY_S)
            try:
                return await self._keep()
            except (AnswerElsewhere, RequestCancelled):
                return  # the next check says so
            except Unavailable:
                continue
