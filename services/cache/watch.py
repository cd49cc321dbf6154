"""Watchers of the index: each gets a snapshot, then every change, and is cut off when it falls too far behind.

A watcher's first messages are the snapshot of the moment it joined; changes made while that is being sent wait in its
backlog, so that snapshot and changes together give the index without a gap.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from headrace.v1 import cache_pb2
from services.cache.index import BlockIndex, BlocksChanged, Change, Holder, HolderJoined
from services.cache.metrics import CacheMetrics
from services.common.block_hash import HASH_BYTES
from services.common.errors import Unavailable

_CHANGE_OVERHEAD_BYTES = 200  # what a change weighs in a backlog beside its hashes and digests


class Watcher:
    """One watch stream: what it still has to be sent."""

    def __init__(self, snapshot: list[Change], backlog_limit_bytes: int) -> None:
        self._snapshot = snapshot
        self._backlog: deque[Change] = deque()
        self._backlog_bytes = 0
        self._limit_bytes = backlog_limit_bytes
        self._wake = asyncio.Event()
        self.cut = False

    def put(self, change: Change) -> None:
        """Adds a change to what must be sent, or cuts the watcher when there is too much of it."""
        if self.cut:
            return
        self._backlog_bytes += _weight(change)
        if self._backlog_bytes > self._limit_bytes:
            self.cut = True
            self._backlog.clear()
        else:
            self._backlog.append(change)
        self._wake.set()

    async def updates(self, epoch: str) -> AsyncIterator[cache_pb2.IndexUpdate]:
        """The snapshot, its end, then changes as they come. Raises Unavailable when the watcher is cut."""
        sequence = 0
        blocks = 0
        for change in self._snapshot:
            sequence += 1
            blocks += len(change.stored) // HASH_BYTES if isinstance(change, BlocksChanged) else 0
            yield _to_update(epoch, sequence, change)
        self._snapshot = []
        sequence += 1
        yield cache_pb2.IndexUpdate(epoch=epoch, sequence=sequence, snapshot_end=cache_pb2.SnapshotEnd(blocks=blocks))
        while True:
            while self._backlog:
                change = self._backlog.popleft()
                self._backlog_bytes -= _weight(change)
                sequence += 1
                yield _to_update(epoch, sequence, change)
            if self.cut:
                raise Unavailable("This watcher fell too far behind the index; watch again.")
            self._wake.clear()
            await self._wake.wait()


class WatchHub:
    """All watchers of one index."""

    def __init__(self, index: BlockIndex, metrics: CacheMetrics, backlog_limit_bytes: int) -> None:
        self._index = index
        self._metrics = metrics
        self._limit_bytes = backlog_limit_bytes
        self._watchers: set[Watcher] = set()

    def join(self) -> Watcher:
        """A new watcher, which has the index of this moment and every later change to send."""
        watcher = Watcher(list(self._index.snapshot()), self._limit_bytes)
        self._watchers.add(watcher)
        self._metrics.watchers.set(len(self._watchers))
        return watcher

    def leave(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        self._metrics.watchers.set(len(self._watchers))

    def publish(self, change: Change) -> None:
        """Gives a change that was just made to the index to every watcher."""
        for watcher in tuple(self._watchers):
            watcher.put(change)
            if watcher.cut:
                self.leave(watcher)
                self._metrics.watchers_cut.inc()


def holder_to_proto(holder: Holder) -> cache_pb2.Holder:
    return cache_pb2.Holder(
        id=holder.id,
        incarnation=holder.incarnation,
        address=holder.address,
        kv_format=holder.kv_format,
        kind=holder.kind,
    )


def _weight(change: Change) -> int:
    if not isinstance(change, BlocksChanged):
        return _CHANGE_OVERHEAD_BYTES
    return _CHANGE_OVERHEAD_BYTES + len(change.removed) + len(change.stored) + len(change.stored_digests)


def _to_update(epoch: str, sequence: int, change: Change) -> cache_pb2.IndexUpdate:
    if isinstance(change, HolderJoined):
        return cache_pb2.IndexUpdate(epoch=epoch, sequence=sequence, holder_joined=holder_to_proto(change.holder))
    if isinstance(change, BlocksChanged):
        blocks = cache_pb2.HolderBlocks(
            holder_id=change.holder_id,
            replace=change.replace,
            removed=change.removed,
            stored=change.stored,
            stored_digests=change.stored_digests,
        )
        return cache_pb2.IndexUpdate(epoch=epoch, sequence=sequence, blocks=blocks)
    return cache_pb2.IndexUpdate(epoch=epoch, sequence=sequence, holder_left_id=change.holder_id)
