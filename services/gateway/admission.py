"""Which requests are let in, and the job that each becomes in the queue."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

from headrace.v1.job_pb2 import Job
from services.common.block_hash import chain_hashes, chain_root
from services.common.errors import Overloaded, Unavailable
from services.gateway.active_request import ActiveRequest, ActiveRequests
from services.gateway.answers.journal import Journal
from services.gateway.request import GenerationRequest
from services.gateway.shedder import Shedder

# Prompts at least this long are hashed in a thread: 16,384 tokens are 1,024 blocks, about 2 ms.
_THREAD_TOKENS = 16_384
_RETRY_AFTER_S = 2


class Admission:
    """Admits requests up to a number at once, and as long as none would wait too long, until it is closed."""

    def __init__(
        self, active: ActiveRequests, shedder: Shedder, *, max_requests: int, gateway_id: str, incarnation: str
    ) -> None:
        self._active = active
        self._shedder = shedder
        self._max_requests = max_requests
        self._gateway_id = gateway_id
        self._incarnation = incarnation
        self._entering = 0
        self._closed = False

    def close(self) -> None:
        """From now on every request is refused: this gateway is shutting down."""
        self._closed = True

    def _check_open(self) -> None:
        """Raises Overloaded or Unavailable if a request that came now would not be admitted."""
        if self._closed:
            raise Unavailable("This gateway is shutting down; try again.")
        if len(self._active) + self._entering >= self._max_requests:
            raise Overloaded(
                f"This gateway already has {self._max_requests} requests; try again later.",
                retry_after_s=_RETRY_AFTER_S,
            )

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        """Counts a request while it is read, before it can be admitted: it takes up memory already.

        Raises Overloaded or Unavailable.
        """
        self._check_open()
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    def check_load(self, request: GenerationRequest) -> None:
        """Raises Overloaded if a request would wait too long. To be called once for prompts that come together: they
        are let in or refused together.
        """
        self._shedder.check(request.model.name, request.priority)

    async def admit(
        self, request: GenerationRequest, traceparent: str, journal: Journal | None = None
    ) -> ActiveRequest:
        """Registers a request. It counts until `ActiveRequests.remove`. Raises Overloaded or Unavailable."""
        hashes = await _prompt_hashes(request)
        self._check_open()
        job = self._job(request, hashes, traceparent)
        if journal is not None:
            job.answer_id = journal.answer_id
        active = ActiveRequest(request, job, self._shedder.of(request.model.name), journal)
        active.load.entered()
        self._active.add(active)
        return active

    def _job(self, request: GenerationRequest, hashes: bytes, traceparent: str) -> Job:
        now_ms = int(time.time() * 1000)
        return Job(
            request_id=request.caller.internal_id,
            gateway_id=self._gateway_id,
            gateway_incarnation=self._incarnation,
            model=request.model.name,
            priority=request.priority,
            prompt_tokens=len(request.prompt_ids),
            choices=request.choices,
            max_tokens=request.stopping.max_tokens,
            block_hashes=hashes,
            enqueued_unix_ms=now_ms,
            deadline_unix_ms=now_ms + int(seconds_left(request) * 1000),
            traceparent=traceparent,
            deterministic=request.deterministic,
        )


def seconds_left(request: GenerationRequest) -> float:
    """Seconds until the request's deadline; at least 0."""
    waited_s = asyncio.get_running_loop().time() - request.caller.arrived
    return max(0.0, request.caller.timeout_s - waited_s)


async def _prompt_hashes(request: GenerationRequest) -> bytes:
    model = request.model
    root = chain_root(model.name, model.block_size, request.cache_salt)
    if len(request.prompt_ids) < _THREAD_TOKENS:
        return b"".join(chain_hashes(root, request.prompt_ids, model.block_size))
    return b"".join(await asyncio.to_thread(chain_hashes, root, request.prompt_ids, model.block_size))
