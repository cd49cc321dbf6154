"""Admission and credits: what is granted never sums to more than what is free."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.capacity import Capacity, Room
from services.worker.engine.counters import EngineCounters
from services.worker.engine_loop import EngineStatus

AMOUNTS = st.integers(0, 50)
ROOMS = st.builds(Room, AMOUNTS, AMOUNTS, AMOUNTS)


def status(*, commands: int, pending: int = 0, waiting_blocks: int = 0) -> EngineStatus:
    return EngineStatus(EngineCounters(), 0, 0, waiting_blocks, pending, commands)


class Pool:
    """How many of its blocks are free."""

    def __init__(self, free: int) -> None:
        self.free = free


def make_capacity(pool: Pool, max_sequences: int = 8) -> Capacity:
    return Capacity(
        max_sequences=max_sequences,
        max_pending_prefill_tokens=64,
        free_blocks=lambda: pool.free,
    )


@given(ROOMS, st.integers(1, 7), st.integers(0, 100))
def test_shares_sum_to_what_is_free_and_are_even(free: Room, shares: int, turn: int) -> None:
    parts = free.share(shares, turn)
    for resource in ("sequences", "blocks", "prefill_tokens"):
        amounts = [getattr(part, resource) for part in parts]
        assert sum(amounts) == getattr(free, resource)
        assert max(amounts) - min(amounts) <= 1


def test_a_single_slot_comes_round_to_every_scheduler() -> None:
    free = Room(1, 1, 1)
    winners = {index for turn in range(3) for index, part in enumerate(free.share(3, turn)) if part.sequences}
    assert winners == {0, 1, 2}


@given(st.lists(st.tuples(st.builds(Room, st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)), st.booleans())))
def test_what_was_sent_counts_until_the_engine_shows_it(requests: list[tuple[Room, bool]]) -> None:
    pool = Pool(20)
    capacity = make_capacity(pool)
    live = 0
    for command, (demand, ends) in enumerate(requests, start=1):
        before = capacity.free
        admitted = capacity.admits(demand)
        fits = demand.sequences <= before.sequences and demand.blocks <= before.blocks and before.prefill_tokens > 0
        assert admitted == (fits or (live == 0 and demand.sequences <= 8))
        if admitted:
            capacity.sent(capacity.take(demand), command)
            live += demand.sequences
            after = capacity.free
            assert after.sequences == before.sequences - demand.sequences
            assert after.blocks <= before.blocks and after.prefill_tokens <= before.prefill_tokens
        elif ends and live:
            capacity.release()
            live -= 1
        assert capacity.live_sequences == live
        assert min(capacity.free.sequences, capacity.free.blocks, capacity.free.prefill_tokens) >= 0


def test_the_engine_takes_over_the_count_of_what_it_has_seen() -> None:
    pool = Pool(20)
    capacity = make_capacity(pool)
    capacity.sent(capacity.take(Room(1, 4, 30)), command=1)
    capacity.sent(capacity.take(Room(1, 2, 10)), command=2)
    assert capacity.free == Room(6, 20 - 4 - 2 - 2, 64 - 40)
    pool.free = 17
    capacity.observe(status(commands=1, pending=5))
    assert capacity.free == Room(6, 17 - 2 - 2, 64 - 5 - 10)
    pool.free = 17
    capacity.observe(status(commands=2, pending=12, waiting_blocks=2))
    assert capacity.free == Room(6, 17 - 2 - 2, 64 - 12)


def test_what_is_not_in_the_engine_yet_counts_until_it_is_there_or_withdrawn() -> None:
    pool = Pool(20)
    capacity = make_capacity(pool)
    gathering, given_up = capacity.take(Room(1, 4, 30)), capacity.take(Room(1, 2, 10))
    pool.free = 20
    capacity.observe(status(commands=5))
    assert capacity.free == Room(6, 20 - 4 - 2 - 2, 64 - 40)
    capacity.withdraw(given_up)
    capacity.release()
    capacity.sent(gathering, command=6)
    assert capacity.free == Room(7, 20 - 4 - 1, 64 - 30)
    pool.free = 16
    capacity.observe(status(commands=6))
    assert capacity.free == Room(7, 16 - 1, 64)


def test_a_prompt_of_any_length_is_taken_while_prompt_tokens_are_taken_at_all() -> None:
    capacity = make_capacity(Pool(200))
    capacity.sent(capacity.take(Room(1, 1, 63)), command=1)
    assert capacity.admits(Room(1, 20, 300))
    capacity.sent(capacity.take(Room(1, 20, 300)), command=2)
    assert not capacity.admits(Room(1, 1, 1))


def test_an_idle_worker_takes_a_request_larger_than_its_limits_of_comfort() -> None:
    pool = Pool(20)
    capacity = make_capacity(pool)
    large = Room(1, 30, 300)
    assert capacity.admits(large)
    capacity.sent(capacity.take(Room(1, 1, 1)), command=1)
    assert not capacity.admits(large)
    assert not make_capacity(Pool(20), max_sequences=2).admits(Room(3, 1, 1))


def test_what_is_to_be_alone_comes_to_an_idle_worker_and_keeps_others_out() -> None:
    capacity = make_capacity(Pool(50))
    one = Room(1, 1, 1)
    capacity.take(one)
    assert not capacity.admits(one, alone=True)
    capacity.release()
    assert capacity.admits(one, alone=True)
    capacity.take(one, alone=True)
    assert not capacity.admits(one) and capacity.free == Room(0, 0, 0)
    capacity.release()
    assert capacity.admits(one) and capacity.free.sequences == 8
