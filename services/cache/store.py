"""The store: blocks kept in RAM, and behind it on disk if there is one.

What is held is the union of both tiers. Every change of it is told, by KV format, so that the index can say what is
here. Blocks come and go in chains, head first; the tiers are told which block follows which, since a tail without its
head is of no use. Knows no gRPC and no index.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from services.cache.block_key import BlockKey
from services.cache.disk_tier import DiskTier
from services.cache.metrics import CacheMetrics
from services.cache.ram_tier import RamTier
from services.common.kv_blocks import BlockBytes


@dataclass(frozen=True, slots=True)
class HeldChange:
    """What is held of a KV format changed: first chain hashes removed, then stored ones with their digests."""

    kv_format: str
    removed: list[bytes] = field(default_factory=list)
    stored: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Chain:
    """Blocks of one KV format on their way in or out, in order. Given to `Store`, which alone changes it."""

    kv_format: str
    keys: list[BlockKey] = field(default_factory=list)
    last_in_ram: BlockKey | None = None


class Store:
    """Blocks by KV format and chain hash."""

    def __init__(
        self, ram: RamTier, disk: DiskTier | None, metrics: CacheMetrics, on_change: Callable[[HeldChange], None]
    ) -> None:
        """`on_change` is called after each change of what is held, from the event loop."""
        self._ram = ram
        self._disk = disk
        self._metrics = metrics
        self._on_change = on_change
        self._held: dict[str, dict[bytes, bytes]] = {}  # as told: KV format -> chain hash -> digest

    @property
    def held(self) -> Mapping[str, Mapping[bytes, bytes]]:
        """Digests of all blocks held, by KV format and chain hash."""
        return self._held

    async def open(self) -> None:
        """Takes up what the disk holds."""
        if self._disk is not None:
            await self._disk.open(lambda key: self._tell([key]))
            self._tell(list(self._disk))

    async def close(self) -> None:
        """Writes what is still to be written to disk."""
        if self._disk is not None:
            await self._disk.close()

    def put(self, chain: Chain, block: BlockBytes) -> bool:
        """Keeps the next block of a chain that comes in. False if there is no room for it in either tier.

        Never waits for the disk. A block that is held already is left as it is, but for a copy on disk if it has none.
        """
        key = BlockKey(chain.kv_format, block.name)
        evicted = [] if self._is_held(key) else self._put_in_ram(chain, key, block)
        self._tell([key, *evicted, *self._put_on_disk(key, self._ram.get(key) or block)])
        return self._pass(chain, key)

    def end_put(self, chain: Chain) -> None:
        """The chain that came in is complete, or ends here."""
        if self._disk is not None:
            self._disk.touch(chain.keys)

    async def get(self, chain: Chain, name: bytes) -> BlockBytes | None:
        """The next block of a chain that goes out, from RAM or else from disk; None if it is not held."""
        key = BlockKey(chain.kv_format, name)
        tier = "ram"
        block = self._ram.get(key)
        if block is not None:
            self._tell(self._put_on_disk(key, block))
        elif self._disk is not None and key in self._disk:
            tier = "disk"
            block = await self._disk.read(key)
            evicted = self._put_in_ram(chain, key, block) if block is not None else []
            self._tell([key, *evicted])
        if block is None:
            self._metrics.misses.inc()
            return None
        self._metrics.hits.labels(tier).inc()
        self._pass(chain, key)
        return block

    async def fetch(self, kv_format: str, names: Iterable[bytes]) -> AsyncGenerator[BlockBytes, None]:
        """The leading blocks of a chain that are held, in order. The next is read while one is being used.

        To be closed by whoever does not read it to its end.
        """
        chain = Chain(kv_format)
        remaining = iter(names)
        reading = self._start_reading(chain, remaining)
        try:
            while reading is not None and (block := await reading) is not None:
                reading = self._start_reading(chain, remaining)
                yield block
        finally:
            if reading is not None:
                reading.cancel()
            self._ram.touch(chain.keys)
            if self._disk is not None:
                self._disk.touch(chain.keys)

    def _start_reading(self, chain: Chain, remaining: Iterator[bytes]) -> "asyncio.Task[BlockBytes | None] | None":
        name = next(remaining, None)
        return asyncio.create_task(self.get(chain, name)) if name is not None else None

    def _put_in_ram(self, chain: Chain, key: BlockKey, block: BlockBytes) -> list[BlockKey]:
        evicted = self._ram.put(key, block, chain.last_in_ram)
        self._metrics.evictions.labels("ram").inc(len(evicted))
        self._metrics.stored_bytes.labels("ram").set(self._ram.bytes)
        self._metrics.stored_blocks.labels("ram").set(len(self._ram))
        return evicted

    def _put_on_disk(self, key: BlockKey, block: BlockBytes) -> list[BlockKey]:
        """Has a block written that is not on disk: also one that the disk was too busy for when it came, or let go."""
        return self._disk.put(key, block) if self._disk is not None and key not in self._disk else []

    def _pass(self, chain: Chain, key: BlockKey) -> bool:
        """Goes on to a block of the chain, if it is held."""
        if key in self._ram:
            chain.last_in_ram = key
        held = self._is_held(key)
        if held:
            chain.keys.append(key)
        return held

    def _is_held(self, key: BlockKey) -> bool:
        return key.name in self._held.get(key.kv_format, ())

    def _digest(self, key: BlockKey) -> bytes | None:
        if (block := self._ram.get(key)) is not None:
            return block.digest
        return self._disk.digest(key) if self._disk is not None else None

    def _tell(self, keys: list[BlockKey]) -> None:
        """Tells what has become of these blocks, as far as it differs from what was told."""
        changes: dict[str, HeldChange] = {}
        for key in keys:
            held = self._held.setdefault(key.kv_format, {})
            digest = self._digest(key)
            if digest == held.get(key.name):
                continue
            change = changes.setdefault(key.kv_format, HeldChange(key.kv_format))
            if digest is None:
                change.removed.append(key.name)
                del held[key.name]
            else:
                change.stored[key.name] = held[key.name] = digest
        for kv_format in {key.kv_format for key in keys if not self._held[key.kv_format]}:
            del self._held[kv_format]
        for change in changes.values():
            self._on_change(change)
