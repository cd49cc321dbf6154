"""The disk tier with real files: what it holds, in what order it goes, and what happens when the disk fails."""

import logging
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.cache import block_file
from services.cache.block_key import BlockKey
from services.cache.disk_tier import DiskTier
from services.cache.metrics import CacheMetrics
from services.common.block_digest import digest
from services.common.kv_blocks import BlockBytes

SIZE = 4000
FILE = 4096  # what a block of SIZE takes up with its header
KEYS = [BlockKey("f32", bytes([number]) * 16) for number in range(10)]


def block(key: BlockKey, size: int = SIZE) -> BlockBytes:
    data = key.name[:1] * size
    return BlockBytes(key.name, data, digest(data))


class Opened:
    """A tier with its metrics and the blocks that it lost."""

    def __init__(self, folder: Path, max_bytes: int, queue_bytes: int) -> None:
        self._registry = CollectorRegistry()
        self.lost: list[BlockKey] = []
        self.tier = DiskTier(folder, max_bytes, queue_bytes, CacheMetrics(self._registry))

    def count(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"headrace_cache_{name}", labels)


@asynccontextmanager
async def opened(folder: Path, max_bytes: int = 100 * FILE, queue_bytes: int = 100 * FILE) -> AsyncIterator[Opened]:
    """All that was queued is written when this ends."""
    one = Opened(folder, max_bytes, queue_bytes)
    await one.tier.open(one.lost.append)
    yield one
    await one.tier.close()


async def fill(folder: Path, *keys: BlockKey) -> None:
    async with opened(folder) as one:
        for key in keys:
            one.tier.put(key, block(key))


def files(folder: Path) -> set[Path]:
    return set(folder.iterdir())


def paths(folder: Path, *keys: BlockKey) -> set[Path]:
    return {block_file.path_of(folder, key) for key in keys}


async def test_blocks_are_given_out_before_and_after_they_are_written(tmp_path: Path) -> None:
    async with opened(tmp_path / "new" / "folder") as one:
        assert one.tier.put(KEYS[0], block(KEYS[0])) == []
        assert await one.tier.read(KEYS[0]) == block(KEYS[0]), "from the queue"
        await one.tier._jobs.join()
        assert one.count("disk_queue_bytes") == 0
        assert await one.tier.read(KEYS[0]) == block(KEYS[0]), "from its file"
        assert await one.tier.read(KEYS[1]) is None
        assert one.tier.digest(KEYS[0]) == block(KEYS[0]).digest and one.tier.digest(KEYS[1]) is None


async def test_a_restart_finds_all_blocks(tmp_path: Path) -> None:
    await fill(tmp_path, *KEYS[:3])
    async with opened(tmp_path) as one:
        assert set(one.tier) == set(KEYS[:3])
        assert one.tier.bytes == one.count("stored_bytes", tier="disk") == 3 * FILE
        assert one.count("stored_blocks", tier="disk") == 3
        assert [await one.tier.read(key) for key in KEYS[:3]] == [block(key) for key in KEYS[:3]]


async def test_the_least_recently_used_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    await fill(tmp_path, *KEYS[:4])
    async with opened(tmp_path) as one:
        one.tier.touch([KEYS[0], KEYS[2]])
    async with opened(tmp_path, max_bytes=4 * FILE) as one:
        assert list(one.tier) == [KEYS[1], KEYS[3], KEYS[2], KEYS[0]], "of a chain the tail goes before the head"
        assert one.tier.put(KEYS[4], block(KEYS[4])) == [KEYS[1]]
        assert one.tier.put(KEYS[5], block(KEYS[5], 2 * SIZE)) == [KEYS[3], KEYS[2]]
        assert one.count("evictions_total", tier="disk") == 3
    assert files(tmp_path) == paths(tmp_path, KEYS[0], KEYS[4], KEYS[5])


async def test_a_smaller_limit_holds_from_the_start(tmp_path: Path) -> None:
    await fill(tmp_path, *KEYS[:4])
    async with opened(tmp_path, max_bytes=2 * FILE + 1) as one:
        assert list(one.tier) == KEYS[2:4]
    assert files(tmp_path) == paths(tmp_path, *KEYS[2:4])


async def test_it_is_bounded_and_its_files_are_what_it_says(tmp_path: Path) -> None:
    chance = random.Random(5)
    async with opened(tmp_path, max_bytes=4 * FILE, queue_bytes=3 * SIZE) as one:
        for _ in range(300):
            key = chance.choice(KEYS)
            if chance.random() < 0.5:
                one.tier.put(key, block(key, chance.choice([10, SIZE, 2 * SIZE])))
            elif (kept := await one.tier.read(key)) is not None:
                assert kept.name == key.name and digest(kept.data) == kept.digest
            one.tier.touch(chance.sample(KEYS, 3))
            assert one.tier.bytes <= 4 * FILE
            assert sum(path.stat().st_size for path in files(tmp_path) if path.exists()) <= 4 * FILE
        held = list(one.tier)
        assert one.lost == []
    assert files(tmp_path) == paths(tmp_path, *held)
    async with opened(tmp_path) as one:
        assert list(one.tier) == held, "in the same order"


async def test_a_block_too_large_leaves_everything_as_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=2 * FILE) as one:
        one.tier.put(KEYS[0], block(KEYS[0]))
        assert one.tier.put(KEYS[1], block(KEYS[1], 3 * SIZE)) == []
        assert list(one.tier) == [KEYS[0]]


async def test_what_does_not_fit_into_the_queue_is_skipped_and_counted(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_bytes=2 * SIZE) as one:
        for key in KEYS[:4]:
            one.tier.put(key, block(key))
        assert list(one.tier) == KEYS[:2]
        assert one.count("dropped_total", reason="queue_full") == 2
        await one.tier._jobs.join()
        one.tier.put(KEYS[3], block(KEYS[3]))
    assert files(tmp_path) == paths(tmp_path, *KEYS[:2], KEYS[3])


async def test_a_block_that_went_while_it_waited_is_not_written(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=FILE) as one:
        for key in (*KEYS[:3], KEYS[0]):
            one.tier.put(key, block(key))
    assert files(tmp_path) == paths(tmp_path, KEYS[0])


async def test_a_corrupt_block_is_dropped_when_it_is_read_and_may_come_again(tmp_path: Path) -> None:
    await fill(tmp_path, *KEYS[:2])
    path = block_file.path_of(tmp_path, KEYS[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    async with opened(tmp_path) as one:
        assert await one.tier.read(KEYS[0]) is None
        assert list(one.tier) == [KEYS[1]] and one.tier.bytes == FILE
        assert one.count("dropped_total", reason="digest") == 1
        one.tier.put(KEYS[0], block(KEYS[0]))
    assert block_file.read(tmp_path, KEYS[0]) == block(KEYS[0])


async def test_a_file_that_somebody_removed_is_dropped(tmp_path: Path) -> None:
    await fill(tmp_path, KEYS[0])
    async with opened(tmp_path) as one:
        block_file.path_of(tmp_path, KEYS[0]).unlink()
        assert await one.tier.read(KEYS[0]) is None
        assert list(one.tier) == []
        assert one.count("dropped_total", reason="unreadable") == 1


async def test_the_scan_drops_and_counts_what_is_no_block(tmp_path: Path) -> None:
    await fill(tmp_path, *KEYS[:4])
    torn, foreign, garbage = (block_file.path_of(tmp_path, key) for key in KEYS[:3])
    torn.write_bytes(torn.read_bytes()[:-1])
    foreign.write_bytes(foreign.read_bytes().replace(b"\x01\x00", b"\x02\x00", 1))
    garbage.write_bytes(b"garbage" * 100)
    (tmp_path / f"{torn.name}.tmp").write_bytes(b"half")
    async with opened(tmp_path) as one:
        assert list(one.tier) == [KEYS[3]]
        for reason in ("length", "version", "header", "unfinished"):
            assert one.count("dropped_total", reason=reason) == 1
    assert files(tmp_path) == paths(tmp_path, KEYS[3])


async def test_writes_that_fail_are_logged_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "blocks"
    async with opened(folder) as one:
        shutil.rmtree(folder)
        for key in KEYS[:3]:
            one.tier.put(key, block(key))
        await one.tier._jobs.join()
        assert one.lost == KEYS[:3]
        assert len(one.tier) == one.tier.bytes == one.count("disk_queue_bytes") == 0
        assert one.count("disk_faults_total", kind="write_failed") == 3
        folder.mkdir()
        one.tier.put(KEYS[3], block(KEYS[3]))
    assert files(folder) == paths(folder, KEYS[3]), "it goes on when the disk does"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_a_folder_that_cannot_be_used_leaves_the_tier_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    async with opened(tmp_path / "file") as one:
        one.tier.put(KEYS[0], block(KEYS[0]))
        await one.tier._jobs.join()
        assert one.lost == [KEYS[0]]
        assert one.count("disk_faults_total", kind="open_failed") == 1
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
