"""The disk tier: blocks in the files of a folder, bounded by their bytes; the least recently used goes first.

The folder is this process's own. What is in it survives a restart: its headers are read at the start, its bytes when
they are asked for. Nobody waits for a write: blocks to be written wait in a queue that is bounded by bytes, count as
held from there on, and are given out from there. All jobs that change files run in one order, one after the other, in
threads.

Knows no RAM tier and no index: it names what it loses, and whoever opened it draws the conclusions.
"""

import asyncio
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from services.cache import block_file
from services.cache.block_file import BadFile, Found
from services.cache.block_key import BlockKey
from services.cache.metrics import CacheMetrics
from services.common.channel import cancel_and_wait
from services.common.errors import failures_logged
from services.common.kv_blocks import BlockBytes

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Entry:
    digest: bytes
    size: int  # of the file, in bytes
    unwritten: BlockBytes | None = None  # while it waits in the queue


class DiskTier:
    """Blocks by key. The sizes of their files never sum up to more than `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int, queue_bytes: int, metrics: CacheMetrics) -> None:
        """`queue_bytes`: the most bytes of blocks that wait to be written; more are not kept here."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._queue_limit_bytes = queue_bytes
        self._queue_bytes = 0
        self._metrics = metrics
        self._entries: OrderedDict[BlockKey, _Entry] = OrderedDict()  # the least recently used first
        self._jobs: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._on_lost: Callable[[BlockKey], None] = lambda key: None
        self._fault_logged = False
        self.bytes = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._entries)

    def digest(self, key: BlockKey) -> bytes | None:
        """The digest of a block, if it is here."""
        entry = self._entries.get(key)
        return entry.digest if entry is not None else None

    async def open(self, on_lost: Callable[[BlockKey], None]) -> None:
        """Takes up what the folder holds. `on_lost` is called for a block that could not be written after all.

        A folder that cannot be used is logged, and the tier stays empty.
        """
        self._on_lost = on_lost
        self._worker = asyncio.create_task(self._work(), name="disk tier")
        try:
            items = await asyncio.to_thread(lambda: list(block_file.scan(self._folder)))
        except OSError as error:
            self._note_fault("open_failed", error)
            return
        for item in items:
            if isinstance(item, BadFile):
                self._metrics.dropped.labels(item.reason).inc()
        for found in sorted((item for item in items if isinstance(item, Found)), key=lambda found: found.used_ns):
            header = found.header
            size = block_file.size_on_disk(header.key, header.data_bytes)
            self._entries[header.key] = _Entry(header.digest, size)
            self.bytes += size
        self._evict(self.bytes - self._max_bytes)
        self._show()

    async def close(self) -> None:
        """Writes what waits to be written, then ends."""
        if self._worker is not None:
            await self._jobs.join()
            await cancel_and_wait([self._worker])
            self._worker = None

    def put(self, key: BlockKey, block: BlockBytes) -> list[BlockKey]:
        """Takes a block in, to be written soon, and returns what had to go for it.

        One that is here already stays as it is; one for which there is no room, here or in the queue, is not taken in.
        """
        size = block_file.size_on_disk(key, len(block.data))
        if key in self._entries or size > self._max_bytes:
            return []
        if self._queue_bytes + len(block.data) > self._queue_limit_bytes:
            self._metrics.dropped.labels("queue_full").inc()
            return []
        evicted = self._evict(self.bytes + size - self._max_bytes)
        self._entries[key] = entry = _Entry(block.digest, size, block)
        self.bytes += size
        self._queue_bytes += len(block.data)
        self._jobs.put_nowait(functools.partial(self._write, key, entry, block))
        self._show()
        return evicted

    async def read(self, key: BlockKey) -> BlockBytes | None:
        """The block; None if it is not here, or proves to be bad, in which case it is dropped."""
        entry = self._entries.get(key)
        if entry is None or entry.unwritten is not None:
            return entry.unwritten if entry is not None else None
        try:
            block = await asyncio.to_thread(block_file.read, self._folder, key)
            if block.digest == entry.digest:
                return block
            reason = "digest"
        except BadFile as error:
            reason = error.reason
        except OSError as error:
            reason = "unreadable"
            log.info("block %s cannot be read: %s", key.name.hex(), error)
        if self._forget(key, entry):  # else it went, or was replaced, while it was read
            self._metrics.dropped.labels(reason).inc()
            self._remove_files([key])
        return None

    def touch(self, chain: Iterable[BlockKey]) -> None:
        """Notes that these blocks were used, given in the order of their chain: its tail goes before its head."""
        used = [key for key in chain if key in self._entries]
        used.reverse()
        for key in used:
            self._entries.move_to_end(key)
        if used:
            mark = functools.partial(block_file.mark_used, self._folder, used, time.time_ns())
            self._jobs.put_nowait(functools.partial(asyncio.to_thread, mark))

    def _evict(self, excess_bytes: int) -> list[BlockKey]:
        evicted: list[BlockKey] = []
        while excess_bytes > 0:
            key, entry = next(iter(self._entries.items()))
            self._forget(key, entry)
            excess_bytes -= entry.size
            evicted.append(key)
        if evicted:
            self._metrics.evictions.labels("disk").inc(len(evicted))
            self._remove_files(evicted)
        return evicted

    def _forget(self, key: BlockKey, entry: _Entry) -> bool:
        if self._entries.get(key) is not entry:
            return False
        del self._entries[key]
        self.bytes -= entry.size
        self._show()
        return True

    def _remove_files(self, keys: list[BlockKey]) -> None:
        """Behind what is queued: a file goes after it was written, and before others that need its room."""
        self._jobs.put_nowait(functools.partial(self._remove, keys))

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            try:
                with failures_logged(log, "a job of the disk tier failed"):
                    await job()
            finally:
                self._jobs.task_done()

    async def _write(self, key: BlockKey, entry: _Entry, block: BlockBytes) -> None:
        try:
            if self._entries.get(key) is entry:  # else it was evicted while it waited
                await asyncio.to_thread(block_file.write, self._folder, key, block)
        except OSError as error:
            self._note_fault("write_failed", error)
            if self._forget(key, entry):
                self._on_lost(key)
        finally:
            entry.unwritten = None
            self._queue_bytes -= len(block.data)
            self._show()

    async def _remove(self, keys: list[BlockKey]) -> None:
        if failed := await asyncio.to_thread(block_file.remove, self._folder, keys):
            self._metrics.disk_faults.labels("remove_failed").inc(failed)

    def _note_fault(self, kind: str, error: OSError) -> None:
        self._metrics.disk_faults.labels(kind).inc()
        if not self._fault_logged:  # a full disk fails at every block; the metric counts them
            self._fault_logged = True
            log.warning(
                "the folder %s fails, blocks that cannot go there are kept in RAM alone: %s", self._folder, error
            )

    def _show(self) -> None:
        self._metrics.stored_bytes.labels("disk").set(self.bytes)
        self._metrics.stored_blocks.labels("disk").set(len(self._entries))
        self._metrics.disk_queue_bytes.set(self._queue_bytes)
