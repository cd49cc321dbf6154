"""A cache service over real gRPC for tests, and the ends of workers and schedulers on its streams."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.cache.disk_tier import DiskTier
from services.cache.index import BlockIndex
from services.cache.metrics import CacheMetrics
from services.cache.own_blocks import OwnBlocks
from services.cache.ram_tier import RamTier
from services.cache.servicer import CacheServicer
from services.cache.store import Store
from services.cache.watch import WatchHub
from services.common.channel import Outbox, dial
from services.common.kv_wire import with_chunks
from services.common.serve import GrpcServer, Registration

BLOCKS = [bytes([number]) * 16 for number in range(8)]
MIB = 1024 * 1024


@dataclass
class Service:
    stub: "cache_pb2_grpc.CacheAsyncStub"
    index: BlockIndex
    metrics: CollectorRegistry


@asynccontextmanager
async def serving(folder: Path | None = None, *, ram_bytes: int = 100 * MIB) -> AsyncIterator[Service]:
    """A cache service as its composition root puts it together, with small limits."""
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    index = BlockIndex()
    hub = WatchHub(index, metrics, backlog_limit_bytes=100_000)
    own = OwnBlocks("c1", index, hub, metrics)
    disk = DiskTier(folder, 100 * MIB, 100 * MIB, metrics) if folder is not None else None
    store = Store(RamTier(ram_bytes), disk, metrics, own.change)
    await store.open()
    servicer = CacheServicer(index, hub, store, own, metrics, max_block_bytes=4 * MIB)
    add = with_chunks(cache_pb2_grpc.add_CacheServicer_to_server)
    server = GrpcServer([Registration(add, servicer, "headrace.v1.Cache")])
    port = await server.start("127.0.0.1:0")
    own.announce(f"127.0.0.1:{port}", store.held)
    async with dial(f"127.0.0.1:{port}") as channel:
        yield Service(cache_pb2_grpc.CacheStub(channel), index, registry)
    await server.stop(0)
    await store.close()


class Publisher:
    """A worker's end of a Publish stream."""

    def __init__(self, service: Service, holder_id: str = "w1", incarnation: str = "a", *, hello: bool = True) -> None:
        self._reports: Outbox[cache_pb2.BlockReport] = Outbox()
        self.call = service.stub.Publish(self._reports)
        if hello:
            holder = cache_pb2.Holder(id=holder_id, incarnation=incarnation, address="host:1", kv_format="f32")
            self._reports.put(cache_pb2.BlockReport(hello=cache_pb2.HolderHello(holder=holder)))

    def events(
        self, sequence: int, stored: bytes = b"", removed: bytes = b"", digests: bytes = b"", *, snapshot: bool = False
    ) -> None:
        events = cache_pb2.BlockEvents(
            sequence=sequence, snapshot=snapshot, removed=removed, stored=stored, stored_digests=digests
        )
        self._reports.put(cache_pb2.BlockReport(events=events))

    async def reply(self) -> cache_pb2.PublishReply:
        reply = await self.call.read()
        assert isinstance(reply, cache_pb2.PublishReply)
        return reply

    async def status(self) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.call.read()
        return error.value.code()


class Copy:
    """A scheduler's end of a Watch stream: the index as its updates tell it."""

    def __init__(self, service: Service) -> None:
        self._call = service.stub.Watch(cache_pb2.WatchRequest(scheduler_id="s1"))
        self.holders: dict[str, set[bytes]] = {}
        self.digests: dict[bytes, bytes] = {}  # as last told, of any holder's blocks
        self.sequence = 0
        self.epochs: set[str] = set()
        self.snapshot_blocks: int | None = None

    async def until(self, holders: dict[str, set[bytes]]) -> None:
        """Follows the stream until the copy equals `holders` (the test's timeout is the limit)."""
        while self.snapshot_blocks is None or self.holders != holders:
            update = await self._call.read()
            assert isinstance(update, cache_pb2.IndexUpdate)
            self._apply(update)

    def _apply(self, update: cache_pb2.IndexUpdate) -> None:
        assert update.sequence == self.sequence + 1
        self.sequence = update.sequence
        self.epochs.add(update.epoch)
        kind = update.WhichOneof("update")
        if kind == "holder_joined":
            self.holders[update.holder_joined.id] = set()
        elif kind == "holder_left_id":
            del self.holders[update.holder_left_id]
        elif kind == "snapshot_end":
            self.snapshot_blocks = update.snapshot_end.blocks
        else:
            blocks = self.holders[update.blocks.holder_id]
            if update.blocks.replace:
                blocks.clear()
            blocks.difference_update(split(update.blocks.removed))
            blocks.update(split(update.blocks.stored))
            if update.blocks.stored_digests:
                self.digests |= zip(split(update.blocks.stored), split(update.blocks.stored_digests), strict=True)


def split(packed: bytes) -> list[bytes]:
    return [packed[start : start + 16] for start in range(0, len(packed), 16)]
