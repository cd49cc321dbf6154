"""Streams to the cache service: which blocks this worker holds, as a snapshot and then as events.

What waits to be sent is a net change of a set of blocks, so it never outgrows the block pool; while a cache service is
away nothing waits, since it gets a snapshot when it is back. Serving never depends on any of this.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable

import grpc.aio

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.common.channel import ReplicaSessions
from services.worker.engine.block_exchange import PublishedBlocks

log = logging.getLogger(__name__)

_APART_S = 0.05
"""Between two messages. Nearly every step fills a block of some sequence, and nobody asks for one so soon."""

CHUNK_BLOCKS = 64 * 1024
"""The most chain hashes in one message: 1 MiB."""


class Publication:
    """What one cache service has not been told yet."""

    def __init__(self) -> None:
        self._synchronized = False  # a snapshot is on its way or was sent; events before one would say nothing
        self._snapshot_pending = False
        self._stored: dict[bytes, bytes] = {}  # chain hash -> digest
        self._removed: dict[bytes, None] = {}  # an insertion-ordered set
        self._sequence = 0
        self._wake = asyncio.Event()

    def snapshot(self, held: PublishedBlocks) -> None:
        """Starts anew from all blocks held."""
        self._synchronized = self._snapshot_pending = True
        self._stored = dict(zip(held.stored, held.digests, strict=True))
        self._removed = {}
        self._wake.set()

    def change(self, change: PublishedBlocks) -> None:
        """Adds a change after the snapshot."""
        if not self._synchronized:
            return
        for block in change.removed:
            self._stored.pop(block, None)
            self._removed[block] = None
        for block, digest in zip(change.stored, change.digests, strict=True):
            self._removed.pop(block, None)
            self._stored[block] = digest
        if self._stored or self._removed:
            self._wake.set()

    async def messages(self) -> AsyncIterator[cache_pb2.BlockEvents]:
        """What there is to tell, as soon as there is."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            snapshot, self._snapshot_pending = self._snapshot_pending, False
            removed, self._removed = list(self._removed), {}
            stored, digests, self._stored = list(self._stored), list(self._stored.values()), {}
            for start in range(0, max(len(removed), len(stored), 1), CHUNK_BLOCKS):
                self._sequence += 1
                yield cache_pb2.BlockEvents(
                    sequence=self._sequence,
                    snapshot=snapshot and start == 0,
                    removed=b"".join(removed[start : start + CHUNK_BLOCKS]),
                    stored=b"".join(stored[start : start + CHUNK_BLOCKS]),
                    stored_digests=b"".join(digests[start : start + CHUNK_BLOCKS]),
                )
            await asyncio.sleep(_APART_S)


class CacheLink:
    """Publishes this worker's blocks to every cache service.

    `request_snapshot` has somebody call `publish_snapshot` soon. All streams start anew from it: taking a snapshot
    may swallow events that were not published yet.
    """

    def __init__(self, holder: cache_pb2.Holder, caches: Iterable[str], request_snapshot: Callable[[], None]) -> None:
        self._holder = holder
        self._sessions = ReplicaSessions("cache", caches, self._session)
        self._request_snapshot = request_snapshot
        self._publications: set[Publication] = set()

    def publish(self, change: PublishedBlocks) -> None:
        """A step changed which blocks are held."""
        for publication in self._publications:
            publication.change(change)

    def publish_snapshot(self, held: PublishedBlocks) -> None:
        """These are all blocks held now."""
        for publication in self._publications:
            publication.snapshot(held)

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._sessions.run()

    async def _session(self, address: str, channel: grpc.aio.Channel) -> None:
        await channel.channel_ready()
        log.info("publishing to cache %s", address)
        publication = Publication()
        call = cache_pb2_grpc.CacheStub(channel).Publish(self._reports(publication))
        self._publications.add(publication)
        self._request_snapshot()
        try:
            async for reply in call:
                if reply.snapshot_wanted:
                    log.info("cache %s wants a snapshot: %s", address, reply.reason)
                    self._request_snapshot()
        finally:
            self._publications.discard(publication)
            call.cancel()

    async def _reports(self, publication: Publication) -> AsyncIterator[cache_pb2.BlockReport]:
        yield cache_pb2.BlockReport(hello=cache_pb2.HolderHello(holder=self._holder))
        async for events in publication.messages():
            yield cache_pb2.BlockReport(events=events)
