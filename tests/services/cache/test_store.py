"""Both tiers together: what is held is what was told, and what is fetched is what was put."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.cache import block_file
from services.cache.block_key import BlockKey
from services.cache.disk_tier import DiskTier
from services.cache.metrics import CacheMetrics
from services.cache.ram_tier import BLOCK_OVERHEAD_BYTES, RamTier
from services.cache.store import Chain, HeldChange, Store
from services.common.block_digest import digest
from services.common.kv_blocks import BlockBytes

SIZE = 3000
COST = SIZE + BLOCK_OVERHEAD_BYTES
FILE = 4096
NAMES = [bytes([number]) * 16 for number in range(10)]


def block(number: int) -> BlockBytes:
    data = NAMES[number][:1] * SIZE
    return BlockBytes(NAMES[number], data, digest(data))


class Kept:
    """A store, and a copy of what it holds that is made of what it tells."""

    def __init__(self, ram_blocks: int, disk: Path | None, disk_blocks: int, queue_blocks: int = 100) -> None:
        self._registry = CollectorRegistry()
        metrics = CacheMetrics(self._registry)
        self.copy: dict[tuple[str, bytes], bytes] = {}
        self.changes: list[HeldChange] = []
        self.ram = RamTier(ram_blocks * COST)
        self.disk = DiskTier(disk, disk_blocks * FILE, queue_blocks * FILE, metrics) if disk is not None else None
        self.store = Store(self.ram, self.disk, metrics, self._follow)

    def _follow(self, change: HeldChange) -> None:
        self.changes.append(change)
        for name in change.removed:
            del self.copy[change.kv_format, name]
        self.copy |= {(change.kv_format, name): held for name, held in change.stored.items()}

    def put(self, *numbers: int, kv_format: str = "f32") -> list[bool]:
        chain = Chain(kv_format)
        kept = [self.store.put(chain, block(number)) for number in numbers]
        self.store.end_put(chain)
        return kept

    async def fetch(self, *numbers: int, kv_format: str = "f32") -> list[BlockBytes]:
        names = [NAMES[number] for number in numbers]
        async with aclosing(self.store.fetch(kv_format, names)) as blocks:
            return [one async for one in blocks]

    def holds(self, *numbers: int, kv_format: str = "f32") -> bool:
        """Whether exactly these are held, of all formats."""
        return self.copy == {(kv_format, NAMES[number]): block(number).digest for number in numbers}

    def check(self) -> None:
        union = set(self.ram) | set(self.disk or ())
        assert {BlockKey(*key) for key in self.copy} == union
        told = {
            (kv_format, name): held for kv_format, blocks in self.store.held.items() for name, held in blocks.items()
        }
        assert told == self.copy
        assert "" not in self.store.held and all(self.store.held.values()), "no entries for formats without blocks"

    def count(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"headrace_cache_{name}", labels)


@asynccontextmanager
async def opened(
    ram_blocks: int = 3, disk: Path | None = None, disk_blocks: int = 6, queue_blocks: int = 100
) -> AsyncIterator[Kept]:
    kept = Kept(ram_blocks, disk, disk_blocks, queue_blocks)
    await kept.store.open()
    yield kept
    kept.check()
    await kept.store.close()


async def test_without_a_disk_the_ram_is_all_there_is() -> None:
    async with opened(ram_blocks=3) as kept:
        assert kept.put(0, 1, 2) == [True] * 3
        assert kept.holds(0, 1, 2)
        assert kept.put(3) == [True]
        assert kept.holds(0, 1, 3), "the tail goes"
        assert kept.changes[-1] == HeldChange("f32", [NAMES[2]], {NAMES[3]: block(3).digest}), "in one change"
        assert await kept.fetch(0, 1, 2, 3) == [block(0), block(1)]


async def test_what_leaves_the_ram_is_held_on_disk_and_comes_back(tmp_path: Path) -> None:
    async with opened(2, tmp_path) as kept:
        assert kept.put(0, 1) == kept.put(2, 3) == [True, True]
        assert kept.holds(0, 1, 2, 3)
        assert await kept.fetch(0, 1) == [block(0), block(1)]
        assert (kept.count("hits_total", tier="disk"), kept.count("hits_total", tier="ram")) == (2, 0)
        assert await kept.fetch(0, 1) == [block(0), block(1)]
        assert kept.count("hits_total", tier="ram") == 2
        assert kept.holds(0, 1, 2, 3)
        assert all(change.removed == [] for change in kept.changes)


async def test_a_block_is_told_as_removed_when_both_tiers_have_let_it_go(tmp_path: Path) -> None:
    async with opened(2, tmp_path, disk_blocks=3) as kept:
        kept.put(0, 1, 2, 3)
        assert kept.holds(0, 1, 2, 3), "the disk has let the head go, which the RAM holds"
        kept.put(4, 5, 6)
        assert set(kept.disk or ()) == {BlockKey("f32", NAMES[number]) for number in (4, 5, 6)}
        assert kept.holds(4, 5, 6)


@pytest.mark.parametrize("again", ["put", "fetch"])
async def test_a_block_that_the_disk_was_too_busy_for_is_written_when_it_is_used_again(
    tmp_path: Path, again: str
) -> None:
    async with opened(3, tmp_path, queue_blocks=1) as kept:
        kept.put(0, 1)
        assert kept.disk is not None and list(kept.disk) == [BlockKey("f32", NAMES[0])]
        await kept.disk.close()  # it has written what waited
        if again == "put":
            kept.put(0, 1)
        else:
            assert await kept.fetch(0, 1) == [block(0), block(1)]
        assert BlockKey("f32", NAMES[1]) in kept.disk
        assert kept.holds(0, 1)


async def test_a_restart_tells_what_the_disk_holds(tmp_path: Path) -> None:
    async with opened(2, tmp_path) as kept:
        kept.put(0, 1, 2)
        kept.put(0, kv_format="bf16")
        before = kept.copy
    async with opened(2, tmp_path) as kept:
        assert kept.copy == before
        assert await kept.fetch(0, 1, 2) == [block(0), block(1), block(2)]
        assert await kept.fetch(0, kv_format="bf16") == [block(0)]


async def test_a_corrupt_block_ends_the_run_and_is_told_as_removed(tmp_path: Path) -> None:
    async with opened(5, tmp_path) as kept:
        kept.put(0, 1, 2)
    path = block_file.path_of(tmp_path, BlockKey("f32", NAMES[1]))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    async with opened(5, tmp_path) as kept:
        assert await kept.fetch(0, 1, 2) == [block(0)]
        assert kept.holds(0, 2)
        kept.put(0, 1)
        assert await kept.fetch(0, 1, 2) == [block(0), block(1), block(2)]


async def test_a_failed_write_is_told_only_if_the_ram_has_it_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    async with opened(1, tmp_path / "file") as kept:
        assert kept.put(0) == kept.put(1) == [True]
        assert kept.holds(0, 1), "the first waits to be written"
        assert kept.disk is not None
        await kept.disk._jobs.join()
        assert kept.holds(1)


async def test_without_ram_the_disk_keeps_blocks(tmp_path: Path) -> None:
    async with opened(0, tmp_path) as kept:
        assert kept.put(0, 1) == [True, True]
        assert await kept.fetch(0, 1, 2) == [block(0), block(1)]


async def test_what_no_tier_takes_is_not_held() -> None:
    async with opened(0) as kept:
        assert kept.put(0) == [False]
        assert kept.copy == {} and kept.changes == []


async def test_a_fetch_may_end_early(tmp_path: Path) -> None:
    async with opened(0, tmp_path) as kept:
        kept.put(0, 1, 2)
        fetch = kept.store.fetch("f32", NAMES[:3])
        assert await anext(fetch) == block(0)
        await fetch.aclose()
        assert await kept.fetch(0, 1, 2) == [block(0), block(1), block(2)]


async def test_the_next_block_is_read_while_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(3, tmp_path) as kept:
        kept.put(0, 1)
    async with opened(3, tmp_path) as kept:
        assert kept.disk is not None
        begun: list[BlockKey] = []
        read = kept.disk.read

        async def noting(key: BlockKey) -> BlockBytes | None:
            begun.append(key)
            try:
                return await read(key)
            finally:
                reading.set()

        reading = asyncio.Event()
        monkeypatch.setattr(kept.disk, "read", noting)
        fetch = kept.store.fetch("f32", NAMES[:2])
        await anext(fetch)
        reading.clear()
        await reading.wait()
        assert begun == [BlockKey("f32", name) for name in NAMES[:2]]
        await fetch.aclose()


async def test_whatever_happens_what_was_told_is_what_is_held(tmp_path: Path) -> None:
    chance = random.Random(3)
    async with opened(3, tmp_path, disk_blocks=5) as kept:
        for _ in range(300):
            start = chance.randrange(len(NAMES))
            numbers = range(start, min(start + chance.randint(1, 5), len(NAMES)))
            kv_format = chance.choice(["f32", "bf16"])
            if chance.random() < 0.5:
                kept.put(*numbers, kv_format=kv_format)
            else:
                fetched = await kept.fetch(*numbers, kv_format=kv_format)
                assert fetched == [block(number) for number in numbers][: len(fetched)]
            kept.check()
        before = {BlockKey(*key) for key in kept.copy} & set(kept.disk or ())
    async with opened(3, tmp_path, disk_blocks=5) as kept:
        assert {BlockKey(*key) for key in kept.copy} == before
