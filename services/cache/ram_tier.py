"""The RAM tier: blocks in memory, bounded by their bytes. Pure; knows no disk, no tasks and no time.

What goes first is chosen by GreedyDual (Cao & Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997, GreedyDual-Size
with blocks of one size): a block's rank is the clock plus its value, the lowest rank goes, and the clock moves up to
it. So a block gains by being fetched, and loses by not being fetched while others are.

A block stays until those that follow it in its chain have gone, as in a radix tree whose leaves are evicted: a tail
without its head can never be matched.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.cache.block_key import BlockKey
from services.common.kv_blocks import BlockBytes

BLOCK_OVERHEAD_BYTES = 1024
"""What a block is charged beside its bytes: its entries here, in the store and in the index, so that many tiny blocks
are bounded too."""


@dataclass(slots=True, eq=False)
class _Entry:
    block: BlockBytes
    parent: BlockKey | None  # the nearest block before it in its chain that was here when this one came
    followers: int = 0  # blocks here whose parent this is
    fetches: int = 0
    rank: int = 0
    turn: int = 0  # of its last use: among equal ranks the least recently used goes first


class RamTier:
    """Blocks by key. The sum of their bytes and overheads never exceeds `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: dict[BlockKey, _Entry] = {}
        # (rank, turn, key) of every block without followers, the next to go first; also outdated ones, to be skipped.
        self._candidates: list[tuple[int, int, BlockKey]] = []
        self._clock = 0
        self._turns = itertools.count(1)
        self.bytes = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._entries)

    def get(self, key: BlockKey) -> BlockBytes | None:
        """The block, if it is here. Says nothing of its use: see `touch`."""
        entry = self._entries.get(key)
        return entry.block if entry is not None else None

    def put(self, key: BlockKey, block: BlockBytes, parent: BlockKey | None = None) -> list[BlockKey]:
        """Takes a block in and returns what had to go for it. One that is here already stays as it is.

        `parent`: the nearest block before it in its chain that is here. The block is not taken in if it is too large,
        or if only blocks before it in its chain could go for it.
        """
        cost = _cost(block)
        if key in self._entries or cost > self._max_bytes:
            return []
        before = self._entries.get(parent) if parent is not None else None
        if before is not None:
            before.followers += 1  # ahead of the eviction: a block must not go for the one that follows it
        evicted = self._evict(self.bytes + cost - self._max_bytes)
        if self.bytes + cost > self._max_bytes:
            self._unfollow(parent)
            return evicted
        self._entries[key] = entry = _Entry(block, parent if before is not None else None)
        self.bytes += cost
        self._rank(key, entry)
        return evicted

    def touch(self, chain: Iterable[BlockKey]) -> None:
        """Notes that these blocks were fetched, given in the order of their chain. Those not here are skipped."""
        for key in reversed(list(chain)):  # the head last, as the most recently used
            if (entry := self._entries.get(key)) is not None:
                entry.fetches += 1
                self._rank(key, entry)
        self._drop_outdated_candidates()

    def _rank(self, key: BlockKey, entry: _Entry) -> None:
        # By the logarithm of the fetches: what was fetched a thousand times and is no more must go some day.
        entry.rank = self._clock + 1 + entry.fetches.bit_length()
        entry.turn = next(self._turns)
        if not entry.followers:
            heapq.heappush(self._candidates, (entry.rank, entry.turn, key))

    def _evict(self, excess_bytes: int) -> list[BlockKey]:
        evicted: list[BlockKey] = []
        while excess_bytes > 0 and self._candidates:
            rank, turn, key = heapq.heappop(self._candidates)
            if not self._is_candidate(key, turn):
                continue
            entry = self._entries.pop(key)
            self._clock = max(self._clock, rank)
            self.bytes -= _cost(entry.block)
            excess_bytes -= _cost(entry.block)
            self._unfollow(entry.parent)
            evicted.append(key)
        return evicted

    def _unfollow(self, key: BlockKey | None) -> None:
        """A follower of this block has gone, or has not come."""
        entry = self._entries.get(key) if key is not None else None
        if key is None or entry is None:
            return
        entry.followers -= 1
        if not entry.followers:
            heapq.heappush(self._candidates, (entry.rank, entry.turn, key))

    def _is_candidate(self, key: BlockKey, turn: int) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.turn == turn and not entry.followers

    def _drop_outdated_candidates(self) -> None:
        if len(self._candidates) > 2 * len(self._entries) + 64:
            current = {item for item in self._candidates if self._is_candidate(item[2], item[1])}
            self._candidates = sorted(current)  # a sorted list is a heap


def _cost(block: BlockBytes) -> int:
    return len(block.data) + BLOCK_OVERHEAD_BYTES
