"""The engine's blocks for those outside its thread: named blocks to read, fresh ones to fill.

The engine and others touch the block pool in turns, under one lock. The engine holds it while it forms a batch and
while it commits one, but not while the model runs, so that nobody waits for a step. A block that somebody holds is not
evicted; a named one is never written; a fresh one is its holder's alone. So the bytes themselves need no lock.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.common.block_digest import digest
from services.worker.engine.block_pool import BlockPool


class BlockMemory(Protocol):
    """The bytes behind the pool's blocks."""

    def read_block(self, block: int) -> bytes | memoryview: ...

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        """Raises ValueError if the data has not the size of a block."""


@dataclass(frozen=True, slots=True)
class NamedBlock:
    """A complete block: its id in the pool, its chain hash, and the digest of its bytes."""

    block: int
    name: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class PublishedBlocks:
    """Net change of the set of named blocks, with the digest of each new one."""

    stored: list[bytes]
    digests: list[bytes]
    removed: list[bytes]


class BlockExchange:
    """Gives and takes blocks; whoever got one by `hold` or `take` gives it back by `release`."""

    def __init__(self, pool: BlockPool, memory: BlockMemory) -> None:
        self.lock = threading.Lock()
        """Held by the engine while it changes the pool."""
        self._pool = pool
        self._memory = memory

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken now."""
        return self._pool.free_blocks

    def hold(self, names: Sequence[bytes]) -> list[NamedBlock]:
        """The leading blocks of a chain that are here."""
        with self.lock:
            blocks = self._pool.match(names)
            self._pool.allocate(0, shared=blocks)
        return [NamedBlock(block, name, self._digest(block, name)) for block, name in zip(blocks, names, strict=False)]

    def take(self, count: int, keep_free: int) -> list[int] | None:
        """Fresh blocks to fill; None if fewer than `keep_free` blocks stayed free."""
        with self.lock:
            return self._pool.allocate(count, keep_free=keep_free)

    def read(self, block: int) -> bytes | memoryview:
        """The bytes of a block that the caller holds, for as long as it does."""
        return self._memory.read_block(block)

    def fill(self, block: int, name: bytes, data: bytes | memoryview) -> None:
        """Completes a fresh block, which others can share from now on. ValueError if the data is no block's."""
        self._memory.write_block(block, data)
        with self.lock:
            self._pool.name(block, name)

    def release(self, blocks: Iterable[int]) -> None:
        with self.lock:
            self._pool.free(list(blocks))

    def publish(self) -> PublishedBlocks:
        """What changed since the last call. To be called by the engine's thread, without the lock.

        A new block may be evicted while its digest is computed; then the digest is of no use, and the next call
        tells of the removal.
        """
        with self.lock:
            events = self._pool.drain_events()
            blocks = self._pool.match_each(events.stored)
        digests = [self._digest(block, name) for block, name in zip(blocks, events.stored, strict=True)]
        return PublishedBlocks(events.stored, digests, events.removed)

    def snapshot(self) -> PublishedBlocks:
        """All named blocks; later calls of `publish` go on from there. To be called by the engine's thread."""
        self.publish()
        with self.lock:
            names = self._pool.held_hashes()
            blocks = self._pool.match_each(names)
        digests = [self._digest(block, name) for block, name in zip(blocks, names, strict=True)]
        return PublishedBlocks(names, digests, [])

    def _digest(self, block: int, name: bytes) -> bytes:
        known = self._pool.digest(block)
        if known is None:
            known = digest(self._memory.read_block(block))
            with self.lock:
                self._pool.set_digest(block, name, known)
        return known
