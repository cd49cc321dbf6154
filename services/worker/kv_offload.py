"""Sends blocks worth keeping to the cache service, where they outlive this worker's pool and its process.

Worth keeping, and when they are sent:
- blocks that a second request has used already: soon, but when no prompt is being computed, or else a few at a time.
  What shares a prefix often comes together, and would have its first tokens computed beside what is kept of it;
- all blocks of a long prompt, and of what was produced after it: when the engine has had nothing to do for a moment.
  On a small machine every byte sent takes time from the model, and most long prompts never come again. A client that
  asks one thing after the other would else have each answered beside what was kept of the one before.

One chain is sent at a time, at the pace at which the cache service reads. What waits is bounded; the oldest is dropped
first. Serving never depends on any of this.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc.aio

from headrace.v1.cache_pb2 import Holder, LookupRequest
from headrace.v1.cache_pb2_grpc import CacheStub
from services.common.channel import Channels
from services.common.kv_wire import ChunkChannel
from services.worker.engine.engine import StepResult
from services.worker.engine_loop import Turn
from services.worker.kv_export import KvExporter, Run
from services.worker.kv_metrics import KvMetrics

if TYPE_CHECKING:
    from headrace.v1.cache_pb2_grpc import CacheAsyncStub

log = logging.getLogger(__name__)

_REST_S = 0.25  # without work, after which the engine is taken for idle
_PATIENCE_S = 0.25  # for a step without a prompt, before a few blocks that are in use twice are sent
_MOST_WAITING = 64
_BLOCKS_AT_ONCE = 4
_TIMEOUT_S = 30.0  # of a call
_TURN_S = 10.0  # of a chain in use twice, in one call
_RETRY_S = 5.0  # after the cache service did not answer
# A chain that the cache service was found to have is not asked for again so soon: a prompt that many requests share
# would else cost a call for each of them.
_TRUSTED_S = 60.0
_MOST_TRUSTED = 4096


@dataclass(frozen=True, slots=True)
class _Chain:
    names: Sequence[bytes]
    hot: bool  # used twice: not to wait until the engine is idle


class KvOffloader:
    """What of this worker's blocks is to be kept, and the task that sends it."""

    def __init__(
        self,
        exporter: KvExporter,
        caches: Sequence[str],
        kv_format: str,
        block_size: int,
        least_tokens: int,
        metrics: KvMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`least_tokens`: of a prompt that is kept though nobody has used it twice."""
        self._exporter = exporter
        self._caches = caches
        self._kv_format = kv_format
        self._block_size = block_size
        self._least_tokens = least_tokens
        self._metrics = metrics
        self._clock = clock
        # Last names of chains that the cache service has, each with when that was found; the oldest first.
        self._trusted: dict[bytes, float] = {}
        self._channels = Channels()
        self._hot: dict[bytes, _Chain] = {}  # by their last names, in the order in which they came
        self._cold: deque[_Chain] = deque(maxlen=_MOST_WAITING)
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # Nobody's prompt was computed in the engine's last step, or waits for its next one.
        self._calm = asyncio.Event()
        self._calm.set()
        self._rest: asyncio.TimerHandle | None = None  # until it is idle

    def observe(self, turn: Turn) -> None:
        """Called on the event loop after each turn of the engine."""
        busy = turn.status.running or turn.status.waiting
        if busy or turn.result is not None:
            self._idle.clear()
            if self._rest is not None:
                self._rest.cancel()
                self._rest = None
        if not busy and self._rest is None and not self._idle.is_set():
            self._rest = asyncio.get_running_loop().call_later(_REST_S, self._idle.set)
        if busy and _computes_prompts(turn):
            self._calm.clear()
        else:
            self._calm.set()
        if turn.result is not None and self._caches:
            self._consider(turn.result)

    async def run(self) -> None:
        """Sends what is worth it, until cancelled."""
        try:
            while True:
                chain = await self._next()
                try:
                    await self._offload(chain)
                except grpc.aio.AioRpcError as error:
                    log.info("blocks are not kept for now: %s %s", error.code().name, error.details())
                    self._metrics.offload_failed(error.code().name.lower())
                    await asyncio.sleep(_RETRY_S)
                except Exception:
                    log.exception("offloading failed")
                    await asyncio.sleep(_RETRY_S)
        finally:
            await self._channels.close()

    def _consider(self, result: StepResult) -> None:
        for sequence in result.started:
            used = sequence.cached_tokens // self._block_size
            if used and not self._trusts(sequence.hashes[used - 1]):
                self._wait(_Chain(sequence.hashes[:used], hot=True))
        for sequence in result.finished:
            if sequence.prompt_length >= self._least_tokens:
                full = (len(sequence.tokens) - 1) // self._block_size  # the last token's KV was never computed
                self._wait(_Chain(sequence.hashes[:full], hot=False))

    def _wait(self, chain: _Chain) -> None:
        """Has a chain wait to be sent."""
        if chain.hot:
            self._hot[chain.names[-1]] = chain
            if len(self._hot) > _MOST_WAITING:
                del self._hot[next(iter(self._hot))]
        else:
            self._cold.append(chain)
        self._news.set()

    async def _next(self) -> _Chain:
        """The newest chain to send: of those in use twice at any time, of the others while the engine is idle."""
        while True:
            if self._hot:
                return self._hot.popitem()[1]
            if self._cold and self._idle.is_set():
                return self._cold.pop()
            if self._cold:
                await _first_of(self._news, self._idle)
            else:
                await self._news.wait()
            self._news.clear()

    async def _offload(self, chain: _Chain) -> None:
        if self._trusts(chain.names[-1]):
            return
        # One cache service for one chain, so that it has all of it.
        address = self._caches[chain.names[0][0] % len(self._caches)]
        channel: Any = ChunkChannel(self._channels.get(address))
        stub = CacheStub(channel)
        kept = await self._kept(stub, chain.names)
        if kept < len(chain.names):
            answer = await stub.Store(self._messages(chain, kept), timeout=_TIMEOUT_S)
            self._metrics.offloaded(answer.stored_blocks, answer.stored_bytes)
            kept += answer.stored_blocks
        if kept >= len(chain.names):
            self._trust(chain.names[-1])

    def _trusts(self, name: bytes) -> bool:
        found_at = self._trusted.get(name)
        return found_at is not None and self._clock() - found_at < _TRUSTED_S

    def _trust(self, name: bytes) -> None:
        self._trusted.pop(name, None)
        self._trusted[name] = self._clock()
        if len(self._trusted) > _MOST_TRUSTED:
            del self._trusted[next(iter(self._trusted))]

    async def _kept(self, stub: "CacheAsyncStub", names: Sequence[bytes]) -> int:
        """How many leading blocks of a chain the cache service has."""
        request = LookupRequest(kv_format=self._kv_format, block_hashes=b"".join(names))
        answer = await stub.Lookup(request, timeout=_TIMEOUT_S, wait_for_ready=True)  # it may be starting again
        kept = (match.blocks for match in answer.matches if match.holder.kind == Holder.KIND_CACHE)
        return max(kept, default=0)

    async def _messages(self, chain: _Chain, kept: int) -> AsyncIterator[bytes]:
        """A few blocks at a time. What is left waits again: of a chain in use twice after a while, of others once the
        engine works.
        """
        run, began = Run(chain.names, sent=kept), self._clock()
        while not run.complete:
            if self._clock() - began > _TURN_S if chain.hot else not self._idle.is_set():
                self._wait(chain)
                return
            if chain.hot:
                await self._calm_or_patience()
            before = run.sent
            async for message in self._exporter.send(run, most=_BLOCKS_AT_ONCE):
                yield message
            if run.sent == before:
                return  # evicted meanwhile

    async def _calm_or_patience(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                await self._calm.wait()


def _computes_prompts(turn: Turn) -> bool:
    """Whether there are prompts in this step, or to be in the next one."""
    if turn.status.waiting or turn.status.pending_prefill_tokens:
        return True
    return turn.result is not None and not all(piece.is_decode for piece in turn.result.slices)


async def _first_of(*events: asyncio.Event) -> None:
    """Returns when one of the events is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
