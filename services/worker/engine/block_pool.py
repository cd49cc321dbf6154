"""Who holds which KV block, and which blocks hold KV that another sequence can use.

Knows block ids, reference counts and chain hashes; not tokens, tensors, or what a sequence is. Not thread-safe: see
`block_exchange.py` for who may call it when.

A block is in one of three states:
- in use: one or more sequences hold it. It is written only by a sequence that holds it alone and before it is named.
- cached: nobody holds it, its KV is complete and named; it is handed out again on a match, or evicted, least recently
  used first, when a fresh block is needed.
- empty: nobody holds it and it has no name.
Cached and empty blocks are both free.

A name belongs to one block. When two sequences compute the same block at once, the first to finish names it; the
second keeps its own copy, which stays unnamed and is empty again as soon as it is freed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Net change of the named blocks: no hash is in both lists, and applying removals first is right.

    A name that was removed and given again since is among the stored ones: the bytes behind it may be others.
    """

    stored: list[bytes]
    removed: list[bytes]


class BlockPool:
    """A fixed number of blocks of `block_size` tokens each, with ids from 0."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs blocks: got {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack, lowest id on top
        self._digests: list[bytes | None] = [None] * num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._stored: dict[bytes, bool] = {}  # new names -> whether earlier events told of the same name
        self._removed: dict[bytes, None] = {}  # an insertion-ordered set

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated now; cached ones count, since they can be evicted."""
        return len(self._empty) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix of this chain that the pool has. Takes no reference: `allocate` does."""
        blocks: list[int] = []
        for name in hashes:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match_each(self, names: Iterable[bytes]) -> list[int]:
        """The block of each of these names, all of which are in the pool now."""
        return [self._named[name] for name in names]

    def allocate(self, count: int, shared: Sequence[int] = (), keep_free: int = 0) -> list[int] | None:
        """Takes a reference to each of `shared` (from `match`, just now) and to `count` fresh blocks.

        Returns them in this order, or None, with nothing changed, if fewer than `keep_free` blocks stayed free.
        """
        revived = [block for block in shared if not self._references[block]]
        if self.free_blocks - len(revived) - count < keep_free:
            return None
        for block in revived:  # before fresh blocks are taken, which might evict them
            del self._cached[block]
        for block in shared:
            self._references[block] += 1
        return [*shared, *(self._take_fresh() for _ in range(count))]

    def free(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a block table.

        In reverse, so that a chain's tail is evicted before its head: a tail without its head cannot be matched.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is freed more often than it was allocated"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._names[block] is None:
                self._empty.append(block)
            else:
                self._cached[block] = None

    def name(self, block: int, name: bytes) -> None:
        """Makes a full block, whose KV is computed, known under its chain hash; from now on it is never written.

        If another block has that name already this one stays unnamed.
        """
        assert self.is_private(block), f"block {block} cannot be named: it is shared or not in use"
        if name in self._named:
            return
        self._names[block] = name
        self._named[name] = block
        self._stored[name] = name in self._removed
        self._removed.pop(name, None)

    def is_private(self, block: int) -> bool:
        """Whether the block may be written: one holder, and no name under which it could get another."""
        return self._references[block] == 1 and self._names[block] is None

    def digest(self, block: int) -> bytes | None:
        """The digest of a named block's bytes, if it was set."""
        return self._digests[block]

    def set_digest(self, block: int, name: bytes, digest: bytes) -> None:
        """Keeps the digest with the block for as long as it has this name; does nothing if it has it no more."""
        if self._names[block] == name:
            self._digests[block] = digest

    def drain_events(self) -> BlockEvents:
        """What changed since the last call."""
        events = BlockEvents(stored=list(self._stored), removed=list(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    def held_hashes(self) -> list[bytes]:
        """All names, for a snapshot; drain the events at the same moment, since they are part of it."""
        return list(self._named)

    def _take_fresh(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget_name(block)
        self._references[block] = 1
        return block

    def _forget_name(self, block: int) -> None:
        name = self._names[block]
        assert name is not None, "a cached block has a name"
        self._names[block] = None
        self._digests[block] = None
        del self._named[name]
        if self._stored.pop(name, True):
            self._removed[name] = None
