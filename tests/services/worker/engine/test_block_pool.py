"""Rules by hand, then a state machine that plays holders against the pool and checks every block after each move."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.worker.engine.block_pool import BlockPool


def allocate(pool: BlockPool, count: int, shared: list[int] | None = None) -> list[int]:
    blocks = pool.allocate(count, shared or [])
    assert blocks is not None
    return blocks


def cache(pool: BlockPool, *names: bytes) -> list[int]:
    """Fills, names and frees a chain of blocks."""
    blocks = allocate(pool, len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, name)
    pool.free(blocks)
    return blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_refuses_to_be_empty(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(num_blocks, block_size)


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    held = allocate(pool, 3)
    assert pool.allocate(2) is None
    assert pool.free_blocks == 1
    assert pool.allocate(1, keep_free=1) is None
    pool.free(held)
    assert sorted(allocate(pool, 4)) == [0, 1, 2, 3]


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_match_finds_the_longest_prefix() -> None:
    pool = BlockPool(4, 16)
    first, second = cache(pool, b"a", b"b")
    assert pool.match([b"a", b"b", b"c"]) == [first, second]
    assert pool.match([b"x", b"b"]) == []


def test_cached_blocks_count_as_free_and_are_revived() -> None:
    pool = BlockPool(2, 16)
    chain = cache(pool, b"a", b"b")
    assert pool.free_blocks == 2
    assert allocate(pool, 0, pool.match([b"a", b"b"])) == chain
    assert pool.free_blocks == 0
    assert pool.allocate(1) is None


def test_shared_blocks_are_not_evicted_for_the_same_allocation() -> None:
    pool = BlockPool(2, 16)
    first, second = cache(pool, b"a", b"b")
    assert allocate(pool, 1, pool.match([b"a"])) == [first, second]
    assert pool.held_hashes() == [b"a"]


def test_eviction_takes_the_least_recently_used_chain_and_its_tail_first() -> None:
    pool = BlockPool(4, 16)
    cache(pool, b"a1", b"a2")
    cache(pool, b"b1", b"b2")
    pool.free(allocate(pool, 0, pool.match([b"a1", b"a2"])))  # used again
    pool.drain_events()
    evicted = []
    for _ in range(4):
        allocate(pool, 1)
        evicted += pool.drain_events().removed
    assert evicted == [b"b2", b"b1", b"a2", b"a1"]


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2, 16)
    cache(pool, b"a")
    allocate(pool, 1)
    assert pool.held_hashes() == [b"a"]


def test_a_second_copy_stays_unnamed() -> None:
    pool = BlockPool(2, 16)
    [first] = allocate(pool, 1)
    [second] = allocate(pool, 1)
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.match([b"a"]) == [first]
    assert pool.is_private(second)
    pool.free([second])
    pool.free([first])
    assert pool.match([b"a"]) == [first]


def test_only_a_private_block_may_be_written() -> None:
    pool = BlockPool(2, 16)
    [block] = allocate(pool, 1)
    assert pool.is_private(block)
    pool.name(block, b"a")
    assert not pool.is_private(block)
    with pytest.raises(AssertionError, match="cannot be named"):
        pool.name(block, b"b")


def test_freeing_twice_is_caught() -> None:
    pool = BlockPool(2, 16)
    blocks = allocate(pool, 1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(blocks)


def test_events_net_out() -> None:
    pool = BlockPool(1, 16)
    cache(pool, b"a")
    cache(pool, b"b")  # evicts a, which nobody was told of
    events = pool.drain_events()
    assert (events.stored, events.removed) == ([b"b"], [])
    cache(pool, b"c")
    cache(pool, b"b")  # away and back again, and its bytes may be others
    events = pool.drain_events()
    assert (events.stored, events.removed) == ([b"b"], [])


def test_a_digest_lasts_as_long_as_its_blocks_name() -> None:
    pool = BlockPool(1, 16)
    [block] = cache(pool, b"a")
    pool.set_digest(block, b"b", b"of another name")
    assert pool.digest(block) is None
    pool.set_digest(block, b"a", b"digest")
    assert pool.digest(block) == b"digest"
    cache(pool, b"b")
    assert pool.digest(block) is None


# Names of blocks as paths: b"01" is the block that follows b"0". Short alphabets make chains meet.
chains = st.lists(st.sampled_from(b"01"), max_size=4).map(
    lambda path: [bytes(path[: length + 1]) for length in range(len(path))]
)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, fill and give back chains; `written` is what a block's memory holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=7, block_size=1)
        self.holders: list[tuple[list[int], list[bytes], int]] = []  # blocks, chain, how many blocks are computed
        self.written: dict[int, bytes] = {}
        self.index: set[bytes] = set()  # what a reader of the events believes
        self.evicted: set[bytes] = set()  # since the last events

    @rule(chain=chains, keep_free=st.integers(0, 2))
    def admit(self, chain: list[bytes], keep_free: int) -> None:
        shared = self.pool.match(chain)
        for block, name in zip(shared, chain, strict=False):
            assert self.written[block] == name, "a match must hold the KV of its name"
        before = self.pool.free_blocks
        held = self.references()
        names = set(self.pool.held_hashes())
        blocks = self.pool.allocate(len(chain) - len(shared), shared, keep_free)
        self.evicted |= names - set(self.pool.held_hashes())
        taken = sum(1 for block in shared if not held[block]) + len(chain) - len(shared)
        assert (blocks is None) == (before - taken < keep_free), "not now exactly when it does not fit"
        if blocks is None:
            assert self.pool.free_blocks == before
            return
        assert blocks[: len(shared)] == shared
        for block in blocks[len(shared) :]:
            assert not held[block], "a fresh block is held by nobody"
            self.written.pop(block, None)
        self.holders.append((blocks, chain, len(shared)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.holders) - 1))
        blocks, chain, computed = self.holders[which]
        if computed == len(chain):
            return
        assert self.pool.is_private(blocks[computed]), "what is computed is written, so it must be private"
        self.written[blocks[computed]] = chain[computed]
        self.pool.name(blocks[computed], chain[computed])
        self.holders[which] = (blocks, chain, computed + 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks, _, _ = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.free(blocks)

    @rule()
    def report(self) -> None:
        events = self.pool.drain_events()
        assert not set(events.stored) & set(events.removed)
        assert set(events.removed) <= self.index
        assert set(events.stored) & self.index <= self.evicted, "told twice only when the bytes may be others"
        self.evicted.clear()
        self.index = self.index - set(events.removed) | set(events.stored)
        assert self.index == set(self.pool.held_hashes())

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.pool.free_blocks == self.pool.num_blocks - len(+self.references())

    @invariant()
    def only_named_blocks_are_shared(self) -> None:
        for block, count in self.references().items():
            assert count == 1 or not self.pool.is_private(block)
        for blocks, chain, computed in self.holders:
            for block, name in zip(blocks[:computed], chain[:computed], strict=True):
                assert self.written[block] == name, "KV in use was overwritten"

    @invariant()
    def names_lead_to_what_was_written(self) -> None:
        for name in self.pool.held_hashes():
            [block] = self.pool.match([name])
            assert self.written[block] == name

    def teardown(self) -> None:
        for blocks, _, _ in self.holders:
            self.pool.free(blocks)
        assert self.pool.free_blocks == self.pool.num_blocks
        assert sorted(allocate(self.pool, self.pool.num_blocks)) == list(range(self.pool.num_blocks))

    def references(self) -> Counter[int]:
        return Counter(block for blocks, _, _ in self.holders for block in blocks)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBlockPoolHoldsItsInvariants = PoolMachine.TestCase
