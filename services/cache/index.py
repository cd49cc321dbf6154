"""The index: which holder has which blocks, and the digest of their bytes.

Pure state; knows nothing of gRPC, of tasks or of time. Each change is described by a value of `Change`, and whoever
applies the same changes to an empty copy holds the same index.

Built for a million blocks in one process: a block is one 16-byte key in its KV format's table, whose value is a bit
mask of the holders, and one key in the table of each holder, whose value is the digest. The prefix lookup ANDs masks
along the chain.
"""

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from headrace.v1 import cache_pb2
from services.common.block_digest import DIGEST_BYTES
from services.common.block_hash import HASH_BYTES, split_hashes
from services.common.errors import InvalidRequest

CHUNK_BLOCKS = 64 * 1024
"""The most blocks that one change of a snapshot carries: 1 MiB of hashes, and as much of digests."""

UNKNOWN_DIGEST = bytes(DIGEST_BYTES)
"""Stands for the digest of a block whose holder gave none."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has blocks, and their KV format. One that keeps several formats is as many holders."""

    id: str
    incarnation: str
    address: str
    kv_format: str
    kind: "cache_pb2.Holder.Kind.ValueType" = cache_pb2.Holder.KIND_WORKER


@dataclass(frozen=True, slots=True)
class HolderJoined:
    """A holder is new, or a new start of an old one. Either way it holds nothing yet."""

    holder: Holder


@dataclass(frozen=True, slots=True)
class BlocksChanged:
    """What a holder holds changed: forget everything first if `replace`, then remove, then add."""

    holder_id: str
    replace: bool
    removed: bytes  # chain hashes, packed
    stored: bytes
    stored_digests: bytes = b""  # in the order of `stored`, UNKNOWN_DIGEST where not known; empty: none is known


@dataclass(frozen=True, slots=True)
class HolderLeft:
    """A holder is gone, and with it all it held."""

    holder_id: str


Change = HolderJoined | BlocksChanged | HolderLeft


class Applied(Enum):
    """What became of a holder's events."""

    TAKEN = "taken"
    # Something before them was lost: they are ignored, and so is what follows until a snapshot begins.
    GAP = "gap"
    # Ignored, since a snapshot has been asked for and not yet begun.
    AWAITING_SNAPSHOT = "awaiting_snapshot"


@dataclass(slots=True, eq=False)
class Holding:
    """What one holder holds, for as long as its report lasts. Given out by `BlockIndex.join`, which owns it."""

    holder: Holder
    bit: int  # this holder's bit in the masks
    blocks: dict[bytes, bytes] = field(default_factory=dict)  # chain hash -> digest
    expected_sequence: int | None = None  # None until a snapshot has begun
    gap_reported: bool = False


class BlockIndex:
    """All holders and their blocks."""

    def __init__(self) -> None:
        self._holdings: dict[str, Holding] = {}  # by holder id
        self._masks: dict[str, dict[bytes, int]] = {}  # KV format -> chain hash -> bits of its holders
        self._slots: list[Holding | None] = []  # bit number -> holding; freed bits are used again

    @property
    def holder_count(self) -> int:
        return len(self._holdings)

    def block_counts(self) -> dict[str, int]:
        """Distinct blocks of each KV format that some holder reports."""
        formats = {holding.holder.kv_format for holding in self._holdings.values()}
        return {kv_format: len(self._masks.get(kv_format, ())) for kv_format in formats}

    def join(self, holder: Holder) -> Holding:
        """Takes up a holder that begins to report. Whatever was reported under its id before is forgotten."""
        if previous := self._holdings.get(holder.id):
            self.leave(previous)
        slot = self._slots.index(None) if None in self._slots else len(self._slots)
        holding = Holding(holder, 1 << slot)
        self._slots[slot : slot + 1] = [holding]
        self._holdings[holder.id] = holding
        return holding

    def leave(self, holding: Holding) -> bool:
        """Drops a holder and all it holds. False if a later report has already taken its place."""
        if not self.is_current(holding):
            return False
        self._forget_blocks(holding)
        self._slots[holding.bit.bit_length() - 1] = None
        del self._holdings[holding.holder.id]
        return True

    def is_current(self, holding: Holding) -> bool:
        """Whether this is still the report that counts for its holder's id."""
        return self._holdings.get(holding.holder.id) is holding

    def apply(
        self,
        holding: Holding,
        sequence: int,
        *,
        snapshot: bool,
        removed: bytes,
        stored: bytes,
        stored_digests: bytes = b"",
    ) -> Applied:
        """Takes one message of block events of a current holding.

        Raises InvalidRequest if the hashes are not whole, or the digests are not as many.
        """
        removed_hashes, stored_digest_by_hash = unpack_hashes(removed), unpack_digests(stored, stored_digests)
        if snapshot:
            self._forget_blocks(holding)
            holding.gap_reported = False
        elif holding.expected_sequence != sequence:
            holding.expected_sequence = None
            first = not holding.gap_reported
            holding.gap_reported = True
            return Applied.GAP if first else Applied.AWAITING_SNAPSHOT
        holding.expected_sequence = sequence + 1
        self.change(holding, removed_hashes, stored_digest_by_hash)
        return Applied.TAKEN

    def change(self, holding: Holding, removed: Iterable[bytes], stored: Mapping[bytes, bytes]) -> None:
        """Takes a change of what a current holding has: chain hashes removed, then stored ones with their digests.

        For a holder that is this process itself, whose changes cannot be lost on the way.
        """
        masks = self._masks.setdefault(holding.holder.kv_format, {})
        for block in removed:
            self._remove(masks, holding, block)
        for block in stored:
            known = masks.get(block)
            masks[block] = holding.bit if known is None else known | holding.bit
        holding.blocks.update(stored)
        if not masks:
            del self._masks[holding.holder.kv_format]

    def lookup(self, kv_format: str, chain: bytes) -> list[tuple[Holder, int]]:
        """Holders of a KV format that hold leading blocks of the chain, and how many each: longest first."""
        blocks = unpack_hashes(chain)
        # The look-ups are one loop in C, and most of a chain has the holders of its first block: nothing to do there.
        masks = list(map(self._masks.get(kv_format, {}).get, blocks))
        matches: list[tuple[Holder, int]] = []
        remaining = (masks[0] or 0) if masks else 0  # bits of the holders that hold the chain so far
        for length, mask in enumerate(masks):
            if mask == remaining:
                continue
            still = remaining & (mask or 0)
            matches += [(holder, length) for holder in self._holders_of(remaining & ~still)]
            remaining = still
            if not remaining:
                break
        matches += [(holder, len(blocks)) for holder in self._holders_of(remaining)]
        matches.reverse()
        return matches

    def snapshot(self) -> Iterator[Change]:
        """The whole index as changes to an empty one. Not to be mixed with changes to the index."""
        for holding in self._holdings.values():
            yield HolderJoined(holding.holder)
            blocks = iter(holding.blocks.items())
            while chunk := dict(itertools.islice(blocks, CHUNK_BLOCKS)):
                yield BlocksChanged(holding.holder.id, False, b"", b"".join(chunk), pack_digests(chunk.values()))

    def _forget_blocks(self, holding: Holding) -> None:
        masks = self._masks.get(holding.holder.kv_format, {})
        bit = holding.bit
        for block in holding.blocks:  # up to a million, while nobody else is served
            mask = masks[block]
            if mask == bit:
                del masks[block]
            else:
                masks[block] = mask ^ bit
        holding.blocks.clear()
        if not masks:
            self._masks.pop(holding.holder.kv_format, None)

    @staticmethod
    def _remove(masks: dict[bytes, int], holding: Holding, block: bytes) -> None:
        if block not in holding.blocks:
            return
        del holding.blocks[block]
        if rest := masks[block] ^ holding.bit:
            masks[block] = rest
        else:
            del masks[block]

    def _holders_of(self, mask: int) -> Iterator[Holder]:
        while mask:
            slot = mask.bit_length() - 1
            mask &= ~(1 << slot)
            holding = self._slots[slot]
            assert holding is not None, "a mask names only current holders"
            yield holding.holder


def unpack_hashes(packed: bytes) -> list[bytes]:
    """Chain hashes from their packed form. Raises InvalidRequest if the last one is cut off."""
    if len(packed) % HASH_BYTES:
        raise InvalidRequest(f"Chain hashes are {HASH_BYTES} bytes each, and {len(packed)} bytes are no whole number.")
    return split_hashes(packed)


def unpack_digests(hashes: bytes, digests: bytes) -> dict[bytes, bytes]:
    """Digests by chain hash from their packed forms; without digests, UNKNOWN_DIGEST for each.

    Raises InvalidRequest if the hashes are not whole, or the digests are not as many.
    """
    blocks = unpack_hashes(hashes)
    if not digests:
        return dict.fromkeys(blocks, UNKNOWN_DIGEST)
    if len(digests) != len(blocks) * DIGEST_BYTES:
        raise InvalidRequest("Digests of stored blocks are given for all of them or for none.")
    return dict(zip(blocks, (one for (one,) in struct.iter_unpack(f"{DIGEST_BYTES}s", digests)), strict=True))


def pack_digests(digests: Iterable[bytes]) -> bytes:
    """The packed form of digests, which is empty if none of them is known."""
    packed = b"".join(digests)
    return packed if packed != bytes(len(packed)) else b""
