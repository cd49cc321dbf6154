"""Follows the block index of the cache service over `Cache/Watch`, and keeps what was known while it is away."""

import logging

import grpc.aio

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.common.channel import ReplicaSessions
from services.scheduler.index import BlockIndex, IndexGap, IndexUnion
from services.scheduler.metrics import SchedulerMetrics

log = logging.getLogger(__name__)


class CacheWatch:
    """One watch per cache replica; `index` is what those that are there know together.

    A snapshot is read into an index of its own, which counts when it is whole. While no replica is there, what was
    known last stays.
    """

    def __init__(self, scheduler_id: str, metrics: SchedulerMetrics) -> None:
        self._scheduler_id = scheduler_id
        self._metrics = metrics
        self._live: dict[str, BlockIndex] = {}
        self.index = IndexUnion([])

    async def run(self, addresses: tuple[str, ...]) -> None:
        """Runs until cancelled."""
        await ReplicaSessions("cache", addresses, self._watch).run()

    async def _watch(self, address: str, channel: grpc.aio.Channel) -> None:
        stub = cache_pb2_grpc.CacheStub(channel)
        updates = stub.Watch(cache_pb2.WatchRequest(scheduler_id=self._scheduler_id))
        index = BlockIndex()
        try:
            async for update in updates:
                index.apply(update)
                if update.HasField("snapshot_end"):
                    log.info("cache %s: index of %d blocks received", address, index.blocks)
                    self._live[address] = index
                    self._use_live_ones()
                self._metrics.index_blocks.set(self.index.blocks)
        except IndexGap as gap:
            log.info("cache %s: watching again: %s", address, gap)
        finally:
            updates.cancel()
            self._live.pop(address, None)
            self._use_live_ones()

    def _use_live_ones(self) -> None:
        if self._live:
            self.index = IndexUnion(list(self._live.values()))
