"""The index over real gRPC: what watchers hold equals what workers reported."""

import grpc
import pytest
from prometheus_client import CollectorRegistry

from headrace.v1 import cache_pb2
from services.cache.index import UNKNOWN_DIGEST, BlocksChanged, Holder
from services.cache.metrics import CacheMetrics
from services.cache.watch import WatchHub
from tests.services.cache.serving import BLOCKS, Copy, Publisher, Service


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


@pytest.mark.parametrize(
    "fault", ["no hello", "two hellos", "empty hello", "cut hash", "digests", "the cache's own id"]
)
async def test_malformed_reports_are_refused(service: Service, fault: str) -> None:
    holder_id = "c1/f32" if fault == "the cache's own id" else "w1"
    publisher = Publisher(service, holder_id, hello=fault not in ("no hello", "empty hello"))
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
