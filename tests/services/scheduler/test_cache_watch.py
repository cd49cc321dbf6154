import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from services.common.channel import cancel_and_wait
from services.scheduler.cache_watch import CacheWatch
from services.scheduler.metrics import SchedulerMetrics
from tests.services.scheduler.fakes import FakeCache, serving_cache

BLOCK = bytes(16)
OTHER = bytes([1]) * 16


class Watched:
    """A watch of a fake cache, and the means to wait for what it has learned."""

    def __init__(self, cache: FakeCache, watch: CacheWatch) -> None:
        self.cache = cache
        self.watch = watch

    async def until_held(self, *blocks: bytes) -> None:
        while dict(self.watch.index.match("f", blocks).best(9)) != {("a", "1"): len(blocks)}:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    cache = FakeCache()
    watch = CacheWatch("s1", SchedulerMetrics(CollectorRegistry()))
    async with serving_cache(cache) as address:
        running = asyncio.create_task(watch.run((address,)))
        assert await cache.watchers.get() == "s1"
        yield Watched(cache, watch)
        await cancel_and_wait([running])


async def test_snapshot_then_changes(watched: Watched) -> None:
    watched.cache.snapshot("e", BLOCK)
    await watched.until_held(BLOCK)
    watched.cache.stored("e", 4, OTHER)
    await watched.until_held(BLOCK, OTHER)


async def test_what_is_known_stays_while_the_cache_is_away_and_until_the_next_snapshot(watched: Watched) -> None:
    watched.cache.snapshot("e", BLOCK)
    await watched.until_held(BLOCK)
    watched.cache.updates.put_nowait(None)
    await watched.cache.watchers.get()
    assert watched.watch.index.blocks == 1
    watched.cache.snapshot("f", OTHER)
    await watched.until_held(OTHER)
    assert not watched.watch.index.match("f", [BLOCK]).best(9)


async def test_a_gap_means_watching_again(watched: Watched) -> None:
    watched.cache.snapshot("e", BLOCK)
    watched.cache.stored("e", 9, OTHER)
    await watched.cache.watchers.get()
    assert watched.watch.index.match("f", [BLOCK]).best(9), "what came before the gap is kept for now"
    watched.cache.snapshot("e", BLOCK, OTHER)
    await watched.until_held(BLOCK, OTHER)


async def test_what_each_replica_keeps_is_known_and_stays_while_all_are_away() -> None:
    caches = (FakeCache(), FakeCache())
    watch = CacheWatch("s1", SchedulerMetrics(CollectorRegistry()))
    async with serving_cache(caches[0]) as one, serving_cache(caches[1]) as other:
        running = asyncio.create_task(watch.run((one, other)))
        for number, cache in enumerate(caches):
            await cache.watchers.get()
            cache.snapshot("e", BLOCK, holder=f"c{number}")

        async def until(*holders: str) -> None:
            while {key[0] for key, _ in watch.index.match("f", [BLOCK]).best(9)} != set(holders):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

        await until("c0", "c1")
        caches[0].updates.put_nowait(None)
        await until("c1")
        caches[1].updates.put_nowait(None)
        await caches[0].watchers.get()
        await caches[1].watchers.get()
        await until("c1")
        await cancel_and_wait([running])
