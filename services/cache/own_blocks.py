"""The cache service as a holder in its own index: one holder per KV format that it keeps blocks of.

A holder joins with the first block of its KV format and leaves with the last. Knows neither bytes nor tiers.
"""

import itertools
import secrets
from collections.abc import Iterable, Mapping

from headrace.v1 import cache_pb2
from services.cache.index import (
    CHUNK_BLOCKS,
    BlockIndex,
    BlocksChanged,
    Holder,
    HolderJoined,
    HolderLeft,
    Holding,
    pack_digests,
)
from services.cache.metrics import CacheMetrics
from services.cache.store import HeldChange
from services.cache.watch import WatchHub


class OwnBlocks:
    """Keeps index and watchers up with what this service holds, from `announce` on."""

    def __init__(self, service_id: str, index: BlockIndex, hub: WatchHub, metrics: CacheMetrics) -> None:
        self._prefix = f"{service_id}/"
        self._incarnation = secrets.token_hex(8)
        self._index = index
        self._hub = hub
        self._metrics = metrics
        self._address: str | None = None
        self._holdings: dict[str, Holding] = {}  # by KV format

    def owns(self, holder_id: str) -> bool:
        """Whether a holder id is one of this service's own."""
        return holder_id.startswith(self._prefix)

    def announce(self, address: str, held: Mapping[str, Mapping[bytes, bytes]]) -> None:
        """Joins the index with all that is held. `address`: where others reach this service."""
        self._address = address
        for kv_format, digests in held.items():
            self._change(kv_format, (), digests)

    def change(self, change: HeldChange) -> None:
        """What is held changed. Before `announce` that is nobody's business."""
        if self._address is not None:
            self._change(change.kv_format, change.removed, change.stored)

    def _change(self, kv_format: str, removed: Iterable[bytes], stored: Mapping[bytes, bytes]) -> None:
        holding = self._holdings.get(kv_format) or self._join(kv_format)
        packed_removed = b"".join(removed)
        self._index.change(holding, removed, stored)
        blocks = iter(stored.items())
        while (chunk := dict(itertools.islice(blocks, CHUNK_BLOCKS))) or packed_removed:
            change = BlocksChanged(
                holding.holder.id, False, packed_removed, b"".join(chunk), pack_digests(chunk.values())
            )
            self._hub.publish(change)
            packed_removed = b""
        if not holding.blocks:
            self._leave(holding)
        self._metrics.show(self._index)

    def _join(self, kv_format: str) -> Holding:
        assert self._address is not None, "a holder has an address"
        holder = Holder(
            f"{self._prefix}{kv_format}", self._incarnation, self._address, kv_format, cache_pb2.Holder.KIND_CACHE
        )
        holding = self._holdings[kv_format] = self._index.join(holder)
        self._hub.publish(HolderJoined(holder))
        return holding

    def _leave(self, holding: Holding) -> None:
        del self._holdings[holding.holder.kv_format]
        self._index.leave(holding)
        self._hub.publish(HolderLeft(holding.holder.id))
