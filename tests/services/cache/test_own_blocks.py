"""The cache service as a holder: what watchers are told of it adds up to what it holds."""

import pytest
from prometheus_client import CollectorRegistry

from services.cache.index import CHUNK_BLOCKS, BlockIndex, BlocksChanged, Change, HolderJoined, HolderLeft
from services.cache.metrics import CacheMetrics
from services.cache.own_blocks import OwnBlocks
from services.cache.store import HeldChange
from services.cache.watch import WatchHub

NAMES = [number.to_bytes(16, "big") for number in range(CHUNK_BLOCKS + 1)]
DIGEST = b"d" * 16


class Told(WatchHub):
    """Keeps what it is to tell."""

    def __init__(self, index: BlockIndex, metrics: CacheMetrics) -> None:
        super().__init__(index, metrics, backlog_limit_bytes=1)
        self.changes: list[Change] = []

    def publish(self, change: Change) -> None:
        self.changes.append(change)


@pytest.fixture
def index() -> BlockIndex:
    return BlockIndex()


@pytest.fixture
def told(index: BlockIndex) -> Told:
    return Told(index, CacheMetrics(CollectorRegistry()))


@pytest.fixture
def own(index: BlockIndex, told: Told) -> OwnBlocks:
    return OwnBlocks("c1", index, told, CacheMetrics(CollectorRegistry()))


def test_nothing_is_told_before_it_is_announced(own: OwnBlocks, told: Told, index: BlockIndex) -> None:
    own.change(HeldChange("f32", stored={NAMES[0]: DIGEST}))
    assert told.changes == [] and index.holder_count == 0
    own.announce("host:1", {"f32": {NAMES[1]: DIGEST}})
    joined, blocks = told.changes
    assert isinstance(joined, HolderJoined) and (joined.holder.id, joined.holder.address) == ("c1/f32", "host:1")
    assert isinstance(blocks, BlocksChanged) and (blocks.stored, blocks.stored_digests) == (NAMES[1], DIGEST)
    assert index.lookup("f32", NAMES[1]) == [(joined.holder, 1)]


def test_what_is_announced_comes_in_chunks(own: OwnBlocks, told: Told) -> None:
    own.announce("host:1", {"f32": dict.fromkeys(NAMES, DIGEST)})
    chunks = [change for change in told.changes if isinstance(change, BlocksChanged)]
    assert [len(chunk.stored) for chunk in chunks] == [CHUNK_BLOCKS * 16, 16]
    assert b"".join(chunk.stored for chunk in chunks) == b"".join(NAMES)


def test_a_holder_leaves_with_its_last_block_and_comes_again(own: OwnBlocks, told: Told, index: BlockIndex) -> None:
    own.announce("host:1", {})
    own.change(HeldChange("f32", stored={NAMES[0]: DIGEST}))
    own.change(HeldChange("f32", removed=[NAMES[0]], stored={NAMES[1]: DIGEST}))
    own.change(HeldChange("f32", removed=[NAMES[1]]))
    assert told.changes[-1] == HolderLeft("c1/f32") and index.holder_count == 0
    assert index.block_counts() == {}
    own.change(HeldChange("f32", stored={NAMES[2]: DIGEST}))
    assert [type(change) for change in told.changes[-2:]] == [HolderJoined, BlocksChanged]
    assert index.block_counts() == {"f32": 1}


def test_ids_of_its_own_are_told_from_others(own: OwnBlocks) -> None:
    assert own.owns("c1/f32") and not own.owns("c1") and not own.owns("c10/f32")
