"""This scheduler's copy of the block index: who holds which blocks, and how much of a prompt each would hit.

Pure: it is fed the messages of one `Cache/Watch` stream and knows no connection. Every holder has one bit of an
integer, and every block the bits of its holders, so that a prompt is matched against all workers at once with one
dictionary look-up and one AND per block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from headrace.v1 import cache_pb2
from services.common.block_digest import DIGEST_BYTES
from services.common.block_hash import split_hashes

HolderKey = tuple[str, str]
"""A holder's id and incarnation: what an earlier incarnation held says nothing of the present one."""


_UNKNOWN = bytes(DIGEST_BYTES)


class IndexGap(Exception):
    """An update is missing, or the cache service restarted: what is known cannot be kept up, so watch again."""


@dataclass(slots=True)
class _Holder:
    joined: cache_pb2.Holder
    bit: int
    blocks: dict[bytes, bytes] = field(default_factory=dict)  # chain hash -> digest; zeros where it is not known

    @property
    def key(self) -> HolderKey:
        return self.joined.id, self.joined.incarnation


class BlockIndex:
    """The state after a snapshot and the updates that followed it."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder] = {}
        self._holder_bits: dict[str, dict[bytes, int]] = {}  # KV format -> chain hash -> bits of its holders
        self._by_bit: dict[int, _Holder] = {}
        self._epoch = ""
        self._sequence: int | None = None

    @property
    def blocks(self) -> int:
        """Distinct (KV format, chain hash) pairs."""
        return sum(len(bits) for bits in self._holder_bits.values())

    def apply(self, update: cache_pb2.IndexUpdate) -> None:
        """Takes in the next message of the stream. Raises IndexGap if it does not follow the last one."""
        self._follow(update)
        kind = update.WhichOneof("update")
        if kind == "holder_joined":
            self._join(update.holder_joined)
        elif kind == "blocks":
            self._change(update.blocks)
        elif kind == "holder_left_id":
            self._leave(update.holder_left_id)

    def match(self, kv_format: str, hashes: Sequence[bytes]) -> "Match":
        """Leading blocks of the chain that each holder has."""
        # The look-ups are one loop in C, and most of a chain has the holders of its first block: nothing to do there.
        bits = list(map(self._holder_bits.get(kv_format, {}).get, hashes))
        levels: list[tuple[int, int]] = []
        still = (bits[0] or 0) if bits else 0
        for position, found in enumerate(bits):
            if found == still:
                continue
            here = still & (found or 0)
            if here != still:
                levels.append((position, still & ~here))
                still = here
            if not still:
                break
        if still:
            levels.append((len(bits), still))
        return Match(levels, self._by_bit, self._holders)

    def holder(self, key: HolderKey) -> cache_pb2.Holder | None:
        """Who that is, if it is still known."""
        holder = self._holders.get(key[0])
        return holder.joined if holder is not None and holder.key == key else None

    def digests(self, key: HolderKey, hashes: Sequence[bytes]) -> bytes:
        """The digests that a holder published of these blocks, packed; empty unless it published all of them."""
        holder = self._holders.get(key[0])
        if holder is None or holder.key != key:
            return b""
        digests = [holder.blocks.get(block, _UNKNOWN) for block in hashes]
        return b"" if _UNKNOWN in digests else b"".join(digests)

    def _follow(self, update: cache_pb2.IndexUpdate) -> None:
        if self._sequence is None:
            self._epoch = update.epoch
        elif update.epoch != self._epoch:
            raise IndexGap(f"epoch {update.epoch} follows {self._epoch}")
        elif update.sequence != self._sequence + 1:
            raise IndexGap(f"sequence {update.sequence} follows {self._sequence}")
        self._sequence = update.sequence

    def _join(self, joined: cache_pb2.Holder) -> None:
        self._leave(joined.id)
        bit = 1
        while bit in self._by_bit:
            bit <<= 1
        holder = _Holder(joined, bit)
        self._holders[joined.id] = self._by_bit[bit] = holder

    def _leave(self, holder_id: str) -> None:
        if holder := self._holders.pop(holder_id, None):
            self._forget(holder, list(holder.blocks))
            del self._by_bit[holder.bit]

    def _change(self, change: cache_pb2.HolderBlocks) -> None:
        holder = self._holders.get(change.holder_id)
        if holder is None:
            raise IndexGap(f"blocks of an unknown holder {change.holder_id}")
        self._forget(holder, list(holder.blocks) if change.replace else split_hashes(change.removed))
        holder_bits = self._holder_bits.setdefault(holder.joined.kv_format, {})
        blocks = split_hashes(change.stored)
        digests = split_hashes(change.stored_digests) or [_UNKNOWN] * len(blocks)
        for block, digest in zip(blocks, digests, strict=True):
            holder.blocks[block] = digest
            holder_bits[block] = holder_bits.get(block, 0) | holder.bit

    def _forget(self, holder: _Holder, blocks: list[bytes]) -> None:
        holder_bits = self._holder_bits.get(holder.joined.kv_format, {})
        for block in blocks:
            if holder.blocks.pop(block, None) is None:
                continue
            left = holder_bits[block] & ~holder.bit
            if left:
                holder_bits[block] = left
            else:
                del holder_bits[block]
        if not holder_bits:
            self._holder_bits.pop(holder.joined.kv_format, None)


class Match:
    """How much of a chain each holder has. To be read before the index changes.

    Holders are named only as far as they are asked for: of a thousand, placement wants the best and those it weighs.
    """

    def __init__(
        self, levels: list[tuple[int, int]], by_bit: Mapping[int, _Holder], holders: Mapping[str, _Holder]
    ) -> None:
        """`levels`: (leading blocks, bits of the holders that have exactly so many), in rising order."""
        self._levels = levels
        self._by_bit = by_bit
        self._holders = holders

    def blocks(self, key: HolderKey) -> int:
        """Leading blocks that this holder has."""
        holder = self._holders.get(key[0])
        if holder is None or holder.key != key:
            return 0
        return next((blocks for blocks, bits in self._levels if bits & holder.bit), 0)

    def best(self, count: int) -> list[tuple[HolderKey, int]]:
        """The holders of most blocks, in falling order, and how many each has; `count` of them at most."""
        return list(islice(self._falling(), count))

    def _falling(self) -> Iterator[tuple[HolderKey, int]]:
        for blocks, bits in reversed(self._levels):
            while bits:
                lowest = bits & -bits
                yield self._by_bit[lowest].key, blocks
                bits ^= lowest


class IndexUnion:
    """What the replicas of a cache service know together: each of them all workers, and what itself keeps."""

    def __init__(self, indexes: Sequence[BlockIndex]) -> None:
        self._indexes = indexes

    @property
    def blocks(self) -> int:
        """Distinct (KV format, chain hash) pairs of the replica that knows most."""
        return max((index.blocks for index in self._indexes), default=0)

    def match(self, kv_format: str, hashes: Sequence[bytes]) -> "Match | MatchUnion":
        """Leading blocks of the chain that each holder has."""
        matches = [index.match(kv_format, hashes) for index in self._indexes]
        return matches[0] if len(matches) == 1 else MatchUnion(matches)

    def holder(self, key: HolderKey) -> cache_pb2.Holder | None:
        """Who that is, if it is still known."""
        return next((found for index in self._indexes if (found := index.holder(key))), None)

    def digests(self, key: HolderKey, hashes: Sequence[bytes]) -> bytes:
        """The digests that a holder published of these blocks, packed; empty unless it published all of them."""
        return next((found for index in self._indexes if (found := index.digests(key, hashes))), b"")


class MatchUnion:
    """The matches of a chain in several indexes."""

    def __init__(self, matches: Sequence[Match]) -> None:
        self._matches = matches

    def blocks(self, key: HolderKey) -> int:
        """Leading blocks that this holder has."""
        return max((match.blocks(key) for match in self._matches), default=0)

    def best(self, count: int) -> list[tuple[HolderKey, int]]:
        """The holders of most blocks, in falling order, and how many each has; `count` of them at most."""
        found: dict[HolderKey, int] = {}
        for match in self._matches:
            for key, blocks in match.best(count):
                found[key] = max(blocks, found.get(key, 0))
        return sorted(found.items(), key=lambda item: -item[1])[:count]
