"""The Cache service on the wire: translates, and delegates to the index, its watchers and the store.

A holder counts for as long as its Publish stream. When the stream breaks, all it held is dropped at once: a worker that
reconnects sends a snapshot anyway, and a block promised by a dead worker costs a placement. A second stream of the same
holder takes over from the first, which is ended.
"""

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.cache.block_key import MAX_KV_FORMAT_BYTES
from services.cache.index import (
    Applied,
    BlockIndex,
    BlocksChanged,
    Holder,
    HolderJoined,
    HolderLeft,
    Holding,
    unpack_hashes,
)
from services.cache.metrics import CacheMetrics
from services.cache.own_blocks import OwnBlocks
from services.cache.store import Chain, Store
from services.cache.watch import WatchHub, holder_to_proto
from services.common.block_hash import HASH_BYTES
from services.common.errors import InvalidRequest, Unavailable
from services.common.kv_blocks import BadBlock, BlockAssembler, Chunk, chunks
from services.common.kv_wire import encode
from services.common.tracing import Tracer

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[object, object]


class CacheServicer(cache_pb2_grpc.CacheServicer):
    """Implements `headrace.v1.Cache`."""

    def __init__(
        self,
        index: BlockIndex,
        hub: WatchHub,
        store: Store,
        own: OwnBlocks,
        metrics: CacheMetrics,
        tracer: Tracer | None = None,
        *,
        max_block_bytes: int,
    ) -> None:
        self._index = index
        self._hub = hub
        self._store = store
        self._own = own
        self._metrics = metrics
        self._tracer = tracer or Tracer()
        self._max_block_bytes = max_block_bytes
        self._epoch = secrets.token_hex(8)

    async def Publish(
        self, request_iterator: AsyncIterator[cache_pb2.BlockReport], context: Context
    ) -> AsyncIterator[cache_pb2.PublishReply]:
        holding: Holding | None = None
        try:
            async for report in request_iterator:
                if report.WhichOneof("message") == "hello":
                    if holding is not None:
                        raise InvalidRequest("A Publish stream says hello once.")
                    holding = self._join(report.hello)
                elif holding is None:
                    raise InvalidRequest("A Publish stream begins with a hello that names the holder.")
                elif (reply := self._take(holding, report.events)) is not None:
                    yield reply
        finally:
            if holding is not None:
                self._leave(holding)

    async def Watch(self, request: cache_pb2.WatchRequest, context: Context) -> AsyncIterator[cache_pb2.IndexUpdate]:
        watcher = self._hub.join()
        log.info("scheduler %s watches", request.scheduler_id)
        try:
            async for update in watcher.updates(self._epoch):
                yield update
        finally:
            self._hub.leave(watcher)
            log.info("scheduler %s watches no more%s", request.scheduler_id, ": it fell behind" if watcher.cut else "")

    async def Lookup(self, request: cache_pb2.LookupRequest, context: Context) -> cache_pb2.LookupResponse:
        matches = self._index.lookup(request.kv_format, request.block_hashes)
        self._metrics.lookups.inc()
        if matches:
            self._metrics.lookup_hits.inc()
        return cache_pb2.LookupResponse(
            matches=[
                cache_pb2.LookupResponse.Match(holder=holder_to_proto(holder), blocks=blocks)
                for holder, blocks in matches
            ]
        )

    async def Store(  # type: ignore[override]
        self, request_iterator: AsyncIterator[Chunk], context: Context
    ) -> cache_pb2.StoreResponse:
        answer = cache_pb2.StoreResponse()
        assembler = BlockAssembler(self._max_block_bytes)
        chain = Chain("")
        try:
            async for chunk in request_iterator:
                _check_names(chunk)
                if chunk.kv_format != chain.kv_format:
                    self._store.end_put(chain)
                    chain = Chain(chunk.kv_format)
                if (block := assembler.take(chunk)) is None:
                    continue
                self._metrics.received_bytes.inc(len(block.data))
                if self._store.put(chain, block):
                    answer.stored_blocks += 1
                    answer.stored_bytes += len(block.data)
        except BadBlock as error:
            self._metrics.refused.labels(error.reason).inc()
            raise
        finally:
            self._store.end_put(chain)
        return answer

    async def FetchBlocks(  # type: ignore[override]
        self, request: cache_pb2.FetchBlocksRequest, context: Context
    ) -> AsyncIterator[bytes]:
        _check_kv_format(request.kv_format)
        names = unpack_hashes(request.block_hashes)
        with self._tracer.serving("fetch blocks", context):
            async with aclosing(self._store.fetch(request.kv_format, names)) as blocks:
                async for block in blocks:
                    for chunk in chunks(request.kv_format, block):
                        yield encode(chunk)
                    self._metrics.sent_bytes.inc(len(block.data))

    def _join(self, hello: cache_pb2.HolderHello) -> Holding:
        sent = hello.holder
        if not (sent.id and sent.incarnation and sent.kv_format):
            raise InvalidRequest("A holder needs an id, an incarnation and a kv_format.", field="holder")
        if self._own.owns(sent.id):
            raise InvalidRequest(f"The holder id {sent.id} is one of this cache service's own.", field="holder")
        holder = Holder(sent.id, sent.incarnation, sent.address, sent.kv_format, sent.kind)
        holding = self._index.join(holder)
        self._hub.publish(HolderJoined(holder))
        self._metrics.show(self._index)
        log.info("holder %s joined, incarnation %s", holder.id, holder.incarnation)
        return holding

    def _leave(self, holding: Holding) -> None:
        if self._index.leave(holding):
            self._hub.publish(HolderLeft(holding.holder.id))
            self._metrics.show(self._index)
            log.info("holder %s left", holding.holder.id)

    def _take(self, holding: Holding, events: cache_pb2.BlockEvents) -> cache_pb2.PublishReply | None:
        if not self._index.is_current(holding):
            raise Unavailable("A later stream of this holder has taken over from this one.")
        applied = self._index.apply(
            holding,
            events.sequence,
            snapshot=events.snapshot,
            removed=events.removed,
            stored=events.stored,
            stored_digests=events.stored_digests,
        )
        if applied is Applied.GAP:
            self._metrics.gaps.inc()
            reason = f"events before sequence {events.sequence} are missing"
            log.info("holder %s: %s", holding.holder.id, reason)
            return cache_pb2.PublishReply(snapshot_wanted=True, reason=reason)
        if applied is Applied.TAKEN:
            self._spread(holding, events)
        return None

    def _spread(self, holding: Holding, events: cache_pb2.BlockEvents) -> None:
        change = BlocksChanged(holding.holder.id, events.snapshot, events.removed, events.stored, events.stored_digests)
        self._hub.publish(change)
        self._metrics.events.labels("stored").inc(len(events.stored) // HASH_BYTES)
        self._metrics.events.labels("removed").inc(len(events.removed) // HASH_BYTES)
        if events.snapshot:
            self._metrics.snapshots.inc()
        self._metrics.show(self._index)


def _check_names(chunk: Chunk) -> None:
    _check_kv_format(chunk.kv_format)
    if len(chunk.block_hash) != HASH_BYTES:
        raise InvalidRequest(
            f"A block's chain hash is {HASH_BYTES} bytes, and not {len(chunk.block_hash)}.", field="block_hash"
        )


def _check_kv_format(kv_format: str) -> None:
    if not kv_format:
        raise InvalidRequest("Blocks are stored and asked for by KV format, and kv_format is empty.", field="kv_format")
    if len(kv_format.encode()) > MAX_KV_FORMAT_BYTES:
        raise InvalidRequest(f"kv_format is longer than {MAX_KV_FORMAT_BYTES} bytes.", field="kv_format")
