"""The RAM tier against a plain dictionary of what went in and came out, and the order in which blocks go."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.cache.block_key import BlockKey
from services.cache.ram_tier import BLOCK_OVERHEAD_BYTES, RamTier
from services.common.block_digest import digest
from services.common.kv_blocks import BlockBytes

SIZE = 100
COST = SIZE + BLOCK_OVERHEAD_BYTES
NAMES = [bytes([number]) * 16 for number in range(12)]
KEYS = st.builds(BlockKey, st.sampled_from(["f32", "bf16"]), st.sampled_from(NAMES))


def block(key: BlockKey, size: int = SIZE) -> BlockBytes:
    data = key.name[:1] * size
    return BlockBytes(key.name, data, digest(data))


def keys(*numbers: int) -> list[BlockKey]:
    return [BlockKey("f32", NAMES[number]) for number in numbers]


def put_chain(tier: RamTier, *numbers: int) -> list[BlockKey]:
    evicted: list[BlockKey] = []
    parent = None
    for key in keys(*numbers):
        evicted += tier.put(key, block(key), parent)
        parent = key if key in tier else parent
    return evicted


class RamTierMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.max_bytes = 5 * COST
        self.tier = RamTier(self.max_bytes)
        self.held: dict[BlockKey, BlockBytes] = {}
        self.parents: dict[BlockKey, BlockKey | None] = {}

    @rule(key=KEYS, size=st.sampled_from([1, SIZE, SIZE, SIZE, 3 * COST, 6 * COST]), parent=st.none() | KEYS)
    def put(self, key: BlockKey, size: int, parent: BlockKey | None) -> None:
        before = dict(self.held)
        evicted = self.tier.put(key, block(key, size), parent)
        assert len(set(evicted)) == len(evicted) and key not in evicted
        for gone in evicted:
            del self.held[gone]
            assert gone not in self.parents.values(), "a block went before one that follows it"
            del self.parents[gone]
        if key in before:
            assert not evicted
        elif key in self.tier:
            self.held[key] = block(key, size)
            self.parents[key] = parent if parent in self.held and parent != key else None

    @rule(chain=st.lists(KEYS, max_size=6))
    def touch(self, chain: list[BlockKey]) -> None:
        self.tier.touch(chain)

    @rule(times=st.integers(1, 300), key=KEYS)
    def touch_often(self, times: int, key: BlockKey) -> None:
        for _ in range(times):
            self.tier.touch([key])

    @rule(key=KEYS)
    def get(self, key: BlockKey) -> None:
        assert self.tier.get(key) == self.held.get(key)

    @invariant()
    def what_is_in_is_what_was_put(self) -> None:
        assert {key: self.tier.get(key) for key in self.tier} == self.held
        assert len(self.tier) == len(self.held)

    @invariant()
    def bounded(self) -> None:
        assert self.tier.bytes == sum(len(held.data) + BLOCK_OVERHEAD_BYTES for held in self.held.values())
        assert self.tier.bytes <= self.max_bytes
        assert len(self.tier._candidates) <= 2 * len(self.held) + 64 + 12


RamTierMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRamTier = RamTierMachine.TestCase


def test_the_least_recently_used_goes_first() -> None:
    tier = RamTier(3 * COST)
    for key in keys(0, 1, 2):
        assert tier.put(key, block(key)) == []
    (key,) = keys(3)
    assert tier.put(key, block(key)) == keys(0)


def test_what_is_fetched_outlives_what_is_not() -> None:
    tier = RamTier(3 * COST)
    for key in keys(0, 1, 2):
        tier.put(key, block(key))
    tier.touch(keys(0))
    for key, gone in zip(keys(3, 4), keys(1, 2), strict=True):
        assert tier.put(key, block(key)) == [gone]


def test_what_was_fetched_often_goes_some_day() -> None:
    tier = RamTier(3 * COST)
    (hot,) = keys(0)
    tier.put(hot, block(hot))
    for _ in range(1000):
        tier.touch([hot])
    for number in range(100):
        key = BlockKey("f32", number.to_bytes(16, "big"))
        if hot in tier.put(key, block(key)):
            break
    assert 10 < number < 50, "the logarithm of its fetches, in turnovers of the tier"


def test_a_chain_goes_from_its_tail() -> None:
    tier = RamTier(4 * COST)
    assert put_chain(tier, 0, 1, 2, 3) == []
    tier.touch(keys(2, 3))  # as by one that has the head already
    assert put_chain(tier, 4, 5, 6, 7) == keys(3, 2, 1, 0)


def test_a_chain_that_comes_in_keeps_its_head_from_going_for_its_tail() -> None:
    tier = RamTier(4 * COST)
    for key in keys(0, 1, 2, 3):
        tier.put(key, block(key))
    tier.touch(keys(0, 1, 2, 3))
    tier.touch(keys(0, 1, 2, 3))
    evicted = put_chain(tier, 4, 5, 6, 7)
    assert sorted(evicted) == keys(0, 1, 2, 3), "all others, though each of them was fetched"


def test_of_a_chain_longer_than_the_tier_the_head_stays() -> None:
    tier = RamTier(4 * COST)
    assert put_chain(tier, 0, 1, 2, 3, 4, 5) == []
    assert list(tier) == keys(0, 1, 2, 3)


def test_a_block_larger_than_the_tier_leaves_everything_as_it_is() -> None:
    tier = RamTier(2 * COST)
    put_chain(tier, 0, 1)
    (key,) = keys(2)
    assert tier.put(key, block(key, 3 * COST)) == []
    assert list(tier) == keys(0, 1)
