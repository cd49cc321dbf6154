"""Brings the KV of a prompt's leading blocks from wherever it is, before the prompt's sequence goes to the engine.

Sources are asked one after the other, each for what is still missing: workers and cache services that hold blocks, and
prefill workers that compute them. Every block is checked against the digest that was published of it. What a source
does not give in time is asked of the next one, and of none in the end: then the engine computes it. So a source can
cost time, within limits, and never a request.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from headrace.v1.cache_pb2 import FetchBlocksRequest
from headrace.v1.cache_pb2_grpc import CacheStub
from headrace.v1.machine_time_pb2 import PricedTime
from headrace.v1.scheduler_pb2 import KvSource
from headrace.v1.worker_pb2 import PrefillRequest, Start
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common import tracing
from services.common.block_digest import DIGEST_BYTES
from services.common.channel import Channels
from services.common.kv_blocks import BadBlock, BlockAssembler, BlockBytes
from services.common.kv_wire import ChunkChannel
from services.worker.engine.block_exchange import BlockExchange
from services.worker.kv_metrics import KvMetrics

log = logging.getLogger(__name__)

_NAMES = {KvSource.KIND_WORKER: "worker", KvSource.KIND_CACHE: "cache", KvSource.KIND_PREFILL: "prefill"}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a source is waited for, in seconds. A source slower than computing is of no use."""

    fetch_stall_s: float
    prefill_stall_s: float

    def stall_s(self, source: KvSource) -> float:
        """From one message to the next."""
        return self.prefill_stall_s if source.kind == KvSource.KIND_PREFILL else self.fetch_stall_s

    def total_s(self, source: KvSource, compute_s: float) -> float:
        """For everything that takes `compute_s` seconds to compute here. A prefill worker has its own queue."""
        return self.stall_s(source) + (3 * compute_s if source.kind == KvSource.KIND_PREFILL else compute_s)


@dataclass(slots=True)
class Gathered:
    """Blocks of a prompt's prefix that are held in this worker's pool, in order."""

    blocks: list[int] = field(default_factory=list)
    computed_blocks: int = 0
    """Those of them that were computed for this request."""
    spent: list[PricedTime] = field(default_factory=list)
    """What that took the workers that did."""


@dataclass(slots=True)
class _Fetch:
    """Blocks on their way from one source: `blocks[:done]` are complete."""

    source: KvSource
    names: Sequence[bytes]
    first: int  # position of the first one in the chain
    blocks: list[int]
    done: int = 0
    spent: PricedTime | None = None

    @property
    def complete(self) -> bool:
        """Nothing more is waited for: of a prefill what it took, too, which comes with the last blocks."""
        whole = self.done == len(self.names)
        return whole and (self.spent is not None or self.source.kind != KvSource.KIND_PREFILL)


class KvImporter:
    """Gathers prefixes; several at once, and no block twice at once."""

    def __init__(
        self,
        exchange: BlockExchange,
        kv_format: str,
        block_bytes: int,
        patience: Patience,
        metrics: KvMetrics,
    ) -> None:
        self._exchange = exchange
        self._kv_format = kv_format
        self._block_bytes = block_bytes
        self._patience = patience
        self._metrics = metrics
        self._channels = Channels()
        self._under_way: dict[bytes, asyncio.Future[None]] = {}  # by the chain hash of a fetch's first block

    async def gather(self, names: Sequence[bytes], start: Start, *, keep_free: int, compute_s: float) -> Gathered:
        """The leading blocks of a chain that are here or can be had from the start's sources.

        The caller gets the references. `keep_free`: blocks of the pool that are left to others. `compute_s`: how long
        one block takes to compute here.
        """
        gathered = Gathered()
        with ExitStack() as undo:
            undo.callback(lambda: self._exchange.release(gathered.blocks))
            for source in start.kv_sources:
                await self._from(source, names[: source.blocks], start, gathered, keep_free, compute_s)
            self._take_own(names, gathered)
            undo.pop_all()
        return gathered

    async def close(self) -> None:
        await self._channels.close()

    def _take_own(self, names: Sequence[bytes], gathered: Gathered) -> None:
        have = len(gathered.blocks)
        gathered.blocks += [block.block for block in self._exchange.hold(names[have:])]

    async def _from(
        self,
        source: KvSource,
        names: Sequence[bytes],
        start: Start,
        gathered: Gathered,
        keep_free: int,
        compute_s: float,
    ) -> None:
        """Adds what one source has of the names that are missing."""
        self._take_own(names, gathered)
        have = len(gathered.blocks)
        while have < len(names) and (other := self._under_way.get(names[have])) is not None:
            await asyncio.wait({other})  # somebody fetches the same: what comes of it is here then
            self._take_own(names, gathered)
            if len(gathered.blocks) == have:
                break
            have = len(gathered.blocks)
        if have >= len(names):
            return
        missing = names[have:]
        blocks = self._exchange.take(len(missing), keep_free)
        if blocks is None:
            self._metrics.failed(_NAMES.get(source.kind, "unknown"), "no_room")
            return
        fetch = _Fetch(source, missing, have, blocks)
        arrived = self._under_way[missing[0]] = asyncio.get_running_loop().create_future()
        try:
            await self._fetch(fetch, start, compute_s * len(missing))
        finally:
            gathered.blocks += blocks[: fetch.done]
            self._exchange.release(blocks[fetch.done :])
            del self._under_way[missing[0]]
            arrived.set_result(None)
        if source.kind == KvSource.KIND_PREFILL:
            gathered.computed_blocks += fetch.done
        if fetch.spent is not None:
            gathered.spent.append(fetch.spent)

    async def _fetch(self, fetch: _Fetch, start: Start, compute_s: float) -> None:
        """Fills the fetch's blocks, as far as its source gives them; what goes wrong is counted and ends it."""
        name = _NAMES.get(fetch.source.kind, "unknown")
        began = time.perf_counter()
        reason = ""
        try:
            await self._receive(fetch, start, compute_s)
            if fetch.done < len(fetch.names):
                reason = "missing"
        except TimeoutError:
            reason = "slow"
        except BadBlock as error:
            reason = error.reason
        except grpc.aio.AioRpcError as error:
            reason = error.code().name.lower()
        if reason:
            self._metrics.failed(name, reason)
            log.info(
                "request %s: %s %s gave %d of %d blocks: %s",
                start.request_id, name, fetch.source.address, fetch.done, len(fetch.names), reason,
            )  # fmt: skip
        self._metrics.imported(name, fetch.done, fetch.done * self._block_bytes, time.perf_counter() - began)

    async def _receive(self, fetch: _Fetch, start: Start, compute_s: float) -> None:
        """Raises TimeoutError, BadBlock or AioRpcError where the source fails."""
        loop = asyncio.get_running_loop()
        stall_s = self._patience.stall_s(fetch.source)
        end = loop.time() + self._patience.total_s(fetch.source, compute_s)
        assembler = BlockAssembler(self._block_bytes, self._kv_format)
        call = self._call(fetch, start)
        try:
            async with asyncio.timeout_at(min(end, loop.time() + stall_s)) as timeout:
                async for chunk in call:
                    timeout.reschedule(min(end, loop.time() + stall_s))
                    if chunk.block_hash and (whole := assembler.take(chunk)) is not None:
                        self._fill(fetch, whole)
                    if chunk.spent is not None:
                        fetch.spent = chunk.spent
                    if fetch.complete:
                        return
        finally:
            call.cancel()

    def _call(self, fetch: _Fetch, start: Start) -> Any:
        """The call, whose messages are Chunk."""
        channel: Any = ChunkChannel(self._channels.get(fetch.source.address))
        metadata = ((tracing.HEADER, start.traceparent),) if tracing.is_recorded(start.traceparent) else None
        if fetch.source.kind == KvSource.KIND_PREFILL:
            return WorkerStub(channel).Prefill(
                PrefillRequest(
                    request_id=start.request_id,
                    attempt=start.attempt,
                    kv_format=self._kv_format,
                    prompt_ids=start.prompt_ids,
                    cache_salt=start.cache_salt,
                    skip_blocks=fetch.first,
                    scheduler_id=start.scheduler_id,
                ),
                metadata=metadata,
            )
        stub = CacheStub(channel) if fetch.source.kind == KvSource.KIND_CACHE else WorkerStub(channel)
        request = FetchBlocksRequest(kv_format=self._kv_format, block_hashes=b"".join(fetch.names))
        return stub.FetchBlocks(request, metadata=metadata)

    def _fill(self, fetch: _Fetch, whole: BlockBytes) -> None:
        name = fetch.names[fetch.done]
        if whole.name != name:
            raise BadBlock("order", f"Block {whole.name.hex()} arrived where {name.hex()} was asked for.")
        if len(whole.data) != self._block_bytes:
            raise BadBlock("size", f"A block of {len(whole.data)} bytes arrived, and one has {self._block_bytes}.")
        at = (fetch.first + fetch.done) * DIGEST_BYTES
        published = fetch.source.digests[at : at + DIGEST_BYTES]
        if published and published != whole.digest:
            raise BadBlock("digest", f"Block {name.hex()} is not the one that was published.")
        self._exchange.fill(fetch.blocks[fetch.done], name, whole.data)
        fetch.done += 1
