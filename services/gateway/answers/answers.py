"""Answers as callers read them. Those that are recorded go on when their caller leaves, and can be read again, here or
on another gateway.

The gateway that runs a request holds its deltas in memory; everybody else reads the events from Redis and makes the
same deltas of them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass

from headrace.v1.answer_pb2 import AnswerEvent, StoredRequest
from headrace.v1.job_pb2 import Job
from services.common.errors import HeadraceError, InvalidRequest, Overloaded, Unavailable
from services.common.redis.answers import AnswerStore, State, StoredAnswer
from services.common.redis.queue import JobQueue
from services.gateway.active_request import ActiveRequests
from services.gateway.admission import Admission
from services.gateway.answers.journal import Journal
from services.gateway.answers.merge import merge
from services.gateway.answers.recorded_run import RecordedRun
from services.gateway.answers.recording import Recording, new_choices, replay, restored_request, stored_request
from services.gateway.catalog import Catalog, Model
from services.gateway.direct import Outlet
from services.gateway.errors import AnswerElsewhere, AnswerNotFound, IdempotencyKeyReused, RequestCancelled
from services.gateway.generate import Adoption, Generator
from services.gateway.keys.keys import Keys
from services.gateway.metrics import Metrics
from services.gateway.request import Delta, GenerationRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as a caller reads it."""

    # Names it for those who come back; empty if it is not recorded.
    id: str
    # The id that its caller knows it by.
    request_id: str
    model: str
    system_fingerprint: str
    accepted_unix_s: int
    deltas: AsyncGenerator[Delta, None]


class Answers:
    """Begins recorded requests, adopts those of dead gateways, and lets callers read."""

    def __init__(
        self,
        store: AnswerStore,
        generator: Generator,
        admission: Admission,
        keys: Keys,
        active: ActiveRequests,
        queue: JobQueue,
        catalog: Catalog,
        metrics: Metrics,
        *,
        max_recorded_tokens: int,
        max_readers: int,
    ) -> None:
        """`max_readers`: callers that read answers of other gateways at once; each takes a connection to Redis."""
        self._store = store
        self._generator = generator
        self._admission = admission
        self._keys = keys
        self._active = active
        self._queue = queue
        self._catalog = catalog
        self._metrics = metrics
        self._max_recorded_tokens = max_recorded_tokens
        self._max_readers = max_readers
        self._readers = 0
        self._runs: dict[str, RecordedRun] = {}
        # Ids of requests that are being adopted, before they run.
        self._adopting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(
        self, requests: Sequence[GenerationRequest], recording: Recording | None, outlet: Outlet | None = None
    ) -> Answer:
        """Runs the requests of one call, or attaches to the answer that its recording names already.

        Deltas of an answer that is not recorded may go to the outlet, past those who read the answer. Raises
        HeadraceError.
        """
        if recording is not None:
            return await self._begin_recorded(self._check_recordable(requests), recording)
        self._admission.check_load(requests[0])
        if len(requests) == 1:
            deltas = self._generator.generate(requests[0], outlet=outlet)
        else:
            deltas = merge([self._generator.generate(request) for request in requests], requests[0].choices)
        first, model = requests[0], requests[0].model
        return Answer("", first.caller.request_id, model.name, model.system_fingerprint, int(time.time()), deltas)

    def _check_recordable(self, requests: Sequence[GenerationRequest]) -> GenerationRequest:
        if len(requests) > 1:
            raise InvalidRequest("An answer that is recorded takes one prompt.", field="prompt")
        tokens = requests[0].choices * requests[0].stopping.max_tokens
        if tokens > self._max_recorded_tokens:
            raise InvalidRequest(
                f"An answer that is recorded may have {self._max_recorded_tokens} tokens, all choices together, but "
                f"this one may come to {tokens}: set a smaller max_tokens.",
                field="max_tokens",
            )
        return requests[0]

    async def _begin_recorded(self, request: GenerationRequest, recording: Recording) -> Answer:
        stored = stored_request(request)
        journal = Journal(self._store, recording, stored)
        found = await journal.open()
        if found is not None:
            return await self._attach(recording, found)
        try:
            self._admission.check_load(request)
        except HeadraceError as error:
            await journal.discard(error)
            raise
        self._start(request, journal, None)
        return self._answer(recording.answer_id, stored, 0)

    async def resume(self, answer_id: str, position: int, key_id: str) -> Answer:
        """The answer from a position on. Raises AnswerNotFound unless it is kept for this API key."""
        found = await self._find(answer_id, key_id)
        self._metrics.answers_resumed.inc()
        return self._answer(answer_id, StoredRequest.FromString(found.request), position)

    async def cancel(self, answer_id: str, key_id: str) -> None:
        """Ends the request, wherever it runs. Raises AnswerNotFound unless it is kept for this API key."""
        found = await self._find(answer_id, key_id)
        await self._store.cancel(answer_id)
        active = self._active.get(StoredRequest.FromString(found.request).internal_id)
        if active is not None:
            active.fail(RequestCancelled("The request was cancelled."))

    def offered(self, job: Job, entry_id: str) -> None:
        """A scheduler offers a request whose gateway is dead. One that runs here goes on."""
        runs_here = job.answer_id in self._runs or self._active.get(job.request_id) is not None
        if runs_here or job.request_id in self._adopting:
            return
        self._adopting.add(job.request_id)
        self._in_background(self._adopt(job, entry_id), f"adopt {job.request_id}")

    async def close(self) -> None:
        """Stops what still runs; a request that has not been abandoned is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- running

    def _start(self, request: GenerationRequest, journal: Journal, adoption: Adoption | None) -> None:
        run = RecordedRun(request.caller.internal_id, journal)
        self._runs[journal.answer_id] = run
        self._in_background(self._run(run, self._generator.generate(request, journal, adoption)), run.internal_id)

    async def _run(self, run: RecordedRun, deltas: AsyncGenerator[Delta, None]) -> None:
        try:
            await run.collect(deltas)
            await run.journal.settled()
        finally:
            if self._runs.get(run.journal.answer_id) is run:  # from now on it is read from Redis
                del self._runs[run.journal.answer_id]

    async def _adopt(self, job: Job, entry_id: str) -> None:
        """Goes on with a request whose gateway is dead; ends its entry if there is nothing to go on with."""
        try:
            await self._take_over(job, entry_id)
        except HeadraceError as error:
            log.warning("request %s: not adopted: %s", job.request_id, error.message)
        finally:
            self._adopting.discard(job.request_id)

    async def _take_over(self, job: Job, entry_id: str) -> None:
        """Makes the answer this gateway's, and starts it from the events that it has. Raises HeadraceError."""
        with self._admission.entering():
            model = self._catalog.get(job.model)
            found = await self._take(job, entry_id)
            if found is None:
                return
            stored = StoredRequest.FromString(found.request)
            account = await self._keys.account(stored.key_id)
            events = [AnswerEvent.FromString(event) for event in await self._all_events(job.answer_id)]
        log.info("request %s: adopted after %d events from %s", job.request_id, len(events), found.owner)
        self._metrics.adoptions.inc()
        journal = Journal.adopted(self._store, Recording(job.answer_id, found.fingerprint), stored, events)
        self._start(restored_request(stored, model, account), journal, Adoption(entry_id, found.attempt + 1, job.alone))

    async def _take(self, job: Job, entry_id: str) -> StoredAnswer | None:
        """The answer, if it is this gateway's now."""
        found = await self._store.find(job.answer_id)
        if found is None or found.state is not State.OPEN:
            await self._queue.acknowledge([(job, entry_id)])
            return None
        return found if await self._store.adopt(job.answer_id, found.owner) else None

    def _in_background(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- reading

    async def _attach(self, recording: Recording, fingerprint: bytes) -> Answer:
        if fingerprint != recording.fingerprint:
            raise IdempotencyKeyReused("This idempotency key was used with another request.", field="idempotency-key")
        found = await self._store.find(recording.answer_id)
        if found is None:
            raise Unavailable("The answer under this idempotency key was just forgotten; try again.")
        self._metrics.answers_attached.inc()
        return self._answer(recording.answer_id, StoredRequest.FromString(found.request), 0)

    async def _find(self, answer_id: str, key_id: str) -> StoredAnswer:
        found = await self._store.find(answer_id)
        if found is None or StoredRequest.FromString(found.request).key_id != key_id:
            raise AnswerNotFound(f"Nothing is kept of an answer {answer_id[:200]}.")
        return found

    def _answer(self, answer_id: str, stored: StoredRequest, position: int) -> Answer:
        return Answer(
            id=answer_id,
            request_id=stored.request_id,
            model=stored.model,
            system_fingerprint=stored.system_fingerprint,
            accepted_unix_s=stored.accepted_unix_ms // 1000,
            deltas=self._deltas(answer_id, stored, position, self._runs.get(answer_id)),
        )

    async def _deltas(
        self, answer_id: str, stored: StoredRequest, position: int, run: RecordedRun | None
    ) -> AsyncGenerator[Delta, None]:
        """The deltas from a position on: of the run here, or of what Redis has, until the answer ends."""
        if run is not None:
            try:
                async for delta in run.deltas(position):
                    position = delta.position + 1
                    yield delta
                return
            except AnswerElsewhere as error:
                log.info("answer %s: read from Redis from now on: %s", answer_id, error.message)
        async for delta in self._recorded(answer_id, stored, position):
            yield delta

    async def _recorded(self, answer_id: str, stored: StoredRequest, position: int) -> AsyncGenerator[Delta, None]:
        if self._readers >= self._max_readers:
            raise Overloaded(f"This gateway already reads {self._readers} answers of others; try again later.")
        self._readers += 1
        try:
            async for delta in self._read(answer_id, stored, position):
                yield delta
        finally:
            self._readers -= 1

    async def _read(self, answer_id: str, stored: StoredRequest, position: int) -> AsyncGenerator[Delta, None]:
        choices = new_choices(self._model_of(stored), stored)
        reached = 0
        while True:
            for event in await self._events(answer_id, reached):
                delta = replay(choices, AnswerEvent.FromString(event), reached)
                reached += 1
                if reached > position:
                    yield delta
                elif delta.usage is not None:  # all of it was read before, but for what stands at its end
                    yield Delta(delta.choice, delta.seq + 1, "", delta.text_offset, [], usage=delta.usage)
                if delta.usage is not None:
                    return

    async def _events(self, answer_id: str, position: int) -> list[bytes]:
        """Events from a position on, when there are some. Raises AnswerNotFound once none can come."""
        events = await self._store.read(answer_id, position)
        while not events:
            await self._store.wait(answer_id, position)
            events = await self._store.read(answer_id, position)
            if not events:
                await self._check_kept(answer_id)
        return events

    def _model_of(self, stored: StoredRequest) -> Model:
        """Raises Unavailable: Redis keeps an answer's token ids, and text takes the tokenizer, which workers have."""
        model = self._catalog.recall(stored.model)
        if model is None:
            raise Unavailable(
                f"The answer is kept, but this gateway cannot tell its text: it has not met a worker of model "
                f"{stored.model!r} yet."
            )
        return model

    async def _check_kept(self, answer_id: str) -> None:
        if await self._store.find(answer_id) is None:
            raise AnswerNotFound(f"Nothing is kept of answer {answer_id[:200]} any more.")

    async def _all_events(self, answer_id: str) -> list[bytes]:
        events: list[bytes] = []
        while page := await self._store.read(answer_id, len(events)):
            events += page
        return events
