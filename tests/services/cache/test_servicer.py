"""The cache service over real gRPC: what watchers hold equals what workers reported."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.cache.index import UNKNOWN_DIGEST, BlockIndex, BlocksChanged, Holder
from services.cache.metrics import CacheMetrics
from services.cache.servicer import CacheServicer
from services.cache.watch import WatchHub
from services.common.channel import Outbox, dial
from services.common.serve import GrpcServer, Registration

BLOCKS = [bytes([number]) * 16 for number in range(8)]


@dataclass
class Service:
    stub: "cache_pb2_grpc.CacheAsyncStub"
    index: BlockIndex
    metrics: CollectorRegistry


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    registry = CollectorRegistry()
    metrics = CacheMetrics(registry)
    index = BlockIndex()
    servicer = CacheServicer(index, WatchHub(index, metrics, backlog_limit_bytes=100_000), metrics)
    server = GrpcServer([Registration(cache_pb2_grpc.add_CacheServicer_to_server, servicer, "headrace.v1.Cache")])
    port = await server.start("127.0.0.1:0")
    async with dial(f"127.0.0.1:{port}") as channel:
        yield Service(cache_pb2_grpc.CacheStub(channel), index, registry)
    await server.stop(0)


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


async def test_watchers_follow_reports_from_a_snapshot_on(service: Service) -> None:
    early, publisher = Copy(service), Publisher(service)
    publisher.events(1, BLOCKS[0] + BLOCKS[1], snapshot=True)
    await early.until({"w1": {BLOCKS[0], BLOCKS[1]}})
    assert early.snapshot_blocks == 0
    late = Copy(service)
    await late.until({"w1": {BLOCKS[0], BLOCKS[1]}})
    assert late.snapshot_blocks == 2
    publisher.events(2, stored=BLOCKS[2], removed=BLOCKS[0])
    for copy in (early, late):
        await copy.until({"w1": {BLOCKS[1], BLOCKS[2]}})
    assert early.epochs == late.epochs and len(early.epochs) == 1
    publisher.call.cancel()
    for copy in (early, late):
        await copy.until({})


async def test_digests_reach_early_and_late_watchers(service: Service) -> None:
    early, publisher = Copy(service), Publisher(service)
    publisher.events(1, BLOCKS[0] + BLOCKS[1], digests=b"d" * 32, snapshot=True)
    publisher.events(2, BLOCKS[0], digests=b"e" * 16)
    publisher.events(3, BLOCKS[2])
    await early.until({"w1": set(BLOCKS[:3])})
    assert early.digests == {BLOCKS[0]: b"e" * 16, BLOCKS[1]: b"d" * 16}
    late = Copy(service)
    await late.until({"w1": set(BLOCKS[:3])})
    assert late.digests == early.digests | {BLOCKS[2]: UNKNOWN_DIGEST}


async def test_a_gap_asks_for_a_snapshot_which_replaces_everything(service: Service) -> None:
    copy, publisher = Copy(service), Publisher(service)
    publisher.events(1, BLOCKS[0], snapshot=True)
    publisher.events(3, BLOCKS[1])
    assert (await publisher.reply()).snapshot_wanted
    publisher.events(4, BLOCKS[2], snapshot=True)
    publisher.events(5, BLOCKS[3])
    await copy.until({"w1": {BLOCKS[2], BLOCKS[3]}})
    assert service.metrics.get_sample_value("headrace_cache_gaps_total") == 1
    assert service.metrics.get_sample_value("headrace_cache_snapshots_total") == 2
    assert service.metrics.get_sample_value("headrace_cache_blocks", {"kv_format": "f32"}) == 2


async def test_events_before_any_snapshot_ask_for_one(service: Service) -> None:
    publisher = Publisher(service)
    publisher.events(7, BLOCKS[0])
    assert (await publisher.reply()).snapshot_wanted
    assert service.index.block_counts() == {"f32": 0}


async def test_a_new_incarnation_takes_over_and_the_old_stream_is_ended(service: Service) -> None:
    copy, old = Copy(service), Publisher(service, incarnation="a")
    old.events(1, BLOCKS[0], snapshot=True)
    await copy.until({"w1": {BLOCKS[0]}})
    new = Publisher(service, incarnation="b")
    new.events(1, BLOCKS[1], snapshot=True)
    await copy.until({"w1": {BLOCKS[1]}})
    old.events(2, BLOCKS[2])
    assert await old.status() is grpc.StatusCode.UNAVAILABLE
    new.events(2, BLOCKS[3])
    await copy.until({"w1": {BLOCKS[1], BLOCKS[3]}})


async def test_lookup_gives_the_longest_holder_first(service: Service) -> None:
    copy, short, long = Copy(service), Publisher(service, "w1"), Publisher(service, "w2")
    short.events(1, BLOCKS[0], snapshot=True)
    long.events(1, BLOCKS[0] + BLOCKS[1], snapshot=True)
    await copy.until({"w1": {BLOCKS[0]}, "w2": {BLOCKS[0], BLOCKS[1]}})
    request = cache_pb2.LookupRequest(kv_format="f32", block_hashes=b"".join(BLOCKS[:3]))
    answer = await service.stub.Lookup(request)
    assert [(match.holder.id, match.blocks) for match in answer.matches] == [("w2", 2), ("w1", 1)]
    assert service.metrics.get_sample_value("headrace_cache_lookup_hits_total") == 1
    request.kv_format = "bf16"
    assert not (await service.stub.Lookup(request)).matches


@pytest.mark.parametrize("fault", ["no hello", "two hellos", "empty hello", "cut hash", "digests"])
async def test_malformed_reports_are_refused(service: Service, fault: str) -> None:
    publisher = Publisher(service, hello=fault not in ("no hello", "empty hello"))
    if fault == "two hellos":
        publisher._reports.put(cache_pb2.BlockReport(hello=cache_pb2.HolderHello()))
    elif fault == "empty hello":
        publisher._reports.put(cache_pb2.BlockReport(hello=cache_pb2.HolderHello()))
    elif fault == "digests":
        events = cache_pb2.BlockEvents(sequence=1, snapshot=True, stored=BLOCKS[0], stored_digests=b"x")
        publisher._reports.put(cache_pb2.BlockReport(events=events))
    else:
        publisher.events(1, BLOCKS[0][1:], snapshot=True)
    assert await publisher.status() is grpc.StatusCode.INVALID_ARGUMENT
    assert service.index.holder_count == 0


async def test_a_watcher_that_falls_behind_is_cut_and_others_go_on(service: Service) -> None:
    metrics = CacheMetrics(CollectorRegistry())
    hub = WatchHub(service.index, metrics, backlog_limit_bytes=5_000)
    holding = service.index.join(Holder("w1", "a", "host:1", "f32"))
    slow, fast = hub.join(), hub.join()
    updates = fast.updates("epoch")
    seen = [await anext(updates), await anext(updates)]
    for number in range(1, 301):
        stored = number.to_bytes(16, "big")
        service.index.apply(holding, number, snapshot=number == 1, removed=b"", stored=stored)
        hub.publish(BlocksChanged("w1", number == 1, b"", stored))
        seen.append(await anext(updates))
    assert slow.cut and not fast.cut
    assert [update.sequence for update in seen] == list(range(1, 303))
    late = hub.join()
    late_updates = late.updates("epoch")
    assert (await anext(late_updates)).holder_joined.id == "w1"
    assert len((await anext(late_updates)).blocks.stored) == 300 * 16


async def test_keeping_bytes_is_unimplemented(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await service.stub.Store(iter([cache_pb2.KvChunk()]))
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await service.stub.FetchBlocks(cache_pb2.FetchBlocksRequest()).read()
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "fetch from a holder" in (error.value.details() or "")
