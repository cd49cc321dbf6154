import pytest

from services.worker.engine.batcher import Batch, Batcher
from services.worker.engine.batching_policy import ContinuousBatching
from services.worker.engine.block_pool import BlockPool
from services.worker.engine.sequence import Sequence
from tests.fakes import make_sequence

BLOCK_SIZE = 4


def make_batcher(
    num_blocks: int = 64, max_sequences: int = 4, max_batch_tokens: int = 16, speculative_rows: int = 0
) -> Batcher:
    return Batcher(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        policy=ContinuousBatching(),
        speculative_rows=speculative_rows,
    )


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def add(batcher: Batcher, *sequences: Sequence) -> None:
    for sequence in sequences:
        batcher.add(sequence)


def step(batcher: Batcher) -> list[tuple[object, int, int]]:
    """A step whose model always says 7, as (key, start, length) of the slices."""
    batch = batcher.form_batch()
    sampling = [piece.sequence for piece in batch.slices if piece.samples]
    batcher.commit(batch)
    for sequence in sampling:
        sequence.append(7)
        if sequence.finish is not None:
            batcher.remove(sequence.key)
    return summary(batch)


def summary(batch: Batch) -> list[tuple[object, int, int]]:
    return [(piece.sequence.key, piece.start, piece.length) for piece in batch.slices]


@pytest.mark.parametrize(("max_sequences", "max_batch_tokens", "named"), [(0, 8, "max_sequences"), (9, 8, "max_batch")])
def test_refuses_limits_that_make_no_sense(max_sequences: int, max_batch_tokens: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_batcher(max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)


def test_a_key_is_used_once_at_a_time() -> None:
    batcher = make_batcher()
    add(batcher, make_sequence(1, prompt(3)))
    with pytest.raises(ValueError, match="already"):
        batcher.add(make_sequence(1, prompt(3)))


def test_prefill_goes_in_chunks_within_the_budget() -> None:
    batcher = make_batcher(max_batch_tokens=6)
    add(batcher, make_sequence(1, prompt(14)))
    assert [step(batcher) for _ in range(4)] == [[(1, 0, 6)], [(1, 6, 6)], [(1, 12, 2)], [(1, 14, 1)]]
    assert batcher.counters.prefill_chunks == 3
    assert batcher.counters.prefill_tokens == 14
    assert batcher.counters.decode_tokens == 1


def test_decodes_go_first_and_prefill_takes_what_is_left() -> None:
    batcher = make_batcher(max_batch_tokens=6)
    add(batcher, make_sequence(1, prompt(3)), make_sequence(2, prompt(9, first=50)))
    assert step(batcher) == [(1, 0, 3), (2, 0, 3)]
    assert step(batcher) == [(1, 3, 1), (2, 3, 5)]
    assert step(batcher) == [(1, 4, 1), (2, 8, 1)]
    assert step(batcher) == [(1, 5, 1), (2, 9, 1)]


def test_slices_of_one_token_stand_first_whatever_they_are() -> None:
    batcher = make_batcher()
    add(batcher, make_sequence(1, prompt(3)), make_sequence(2, [9]))
    assert step(batcher) == [(2, 0, 1), (1, 0, 3)]


def test_sequences_join_and_leave_at_every_step() -> None:
    batcher = make_batcher(max_sequences=2)
    add(batcher, *(make_sequence(key, prompt(3, first=10 * key), max_tokens=key + 1) for key in range(3)))
    assert [key for key, _, _ in step(batcher)] == [0, 1]
    assert [key for key, _, _ in step(batcher)] == [1, 2]
    assert [key for key, _, _ in step(batcher)] == [2]
    assert (batcher.num_running, batcher.num_waiting) == (1, 0)


def test_a_hit_leaves_the_last_token_to_compute() -> None:
    batcher = make_batcher()
    add(batcher, make_sequence(1, prompt(8), max_tokens=1))
    step(batcher)
    second = make_sequence(2, prompt(8))
    add(batcher, second)
    assert step(batcher) == [(2, 4, 4)]
    assert second.cached_tokens == 4
    assert batcher.counters.prefix_hit_tokens == 4
    assert batcher.counters.prefix_queried_tokens == 16


def test_other_roots_share_nothing() -> None:
    batcher = make_batcher()
    add(batcher, make_sequence(1, prompt(9), max_tokens=1, cache_root=b"mine"))
    step(batcher)
    add(batcher, make_sequence(2, prompt(9), cache_root=b"yours"))
    assert step(batcher) == [(2, 0, 9)]


def test_output_blocks_are_shared_too() -> None:
    batcher = make_batcher()
    add(batcher, make_sequence(1, prompt(3), max_tokens=6))
    while batcher.num_running + batcher.num_waiting:
        step(batcher)
    add(batcher, make_sequence(2, [*prompt(3), 7, 7, 7, 7, 7, 7, 1]))
    assert step(batcher) == [(2, 8, 2)]


def test_the_newest_is_preempted_and_first_in_line() -> None:
    batcher = make_batcher(num_blocks=5)
    old = make_sequence(1, prompt(7), max_tokens=9)
    new = make_sequence(2, prompt(7, first=50), max_tokens=9)
    late = make_sequence(3, prompt(3, first=90), max_tokens=9)
    add(batcher, old, new)
    assert step(batcher) == [(1, 0, 7), (2, 0, 7)]
    add(batcher, late)
    assert step(batcher) == [(1, 7, 1), (2, 7, 1)]
    assert step(batcher) == [(1, 8, 1)]  # it takes the last block, and the other's next token has none
    assert (new.preemptions, new.computed, new.blocks) == (1, 0, [])
    assert len(new.tokens) == 9
    assert late.blocks == []
    assert batcher.counters.preemptions == 1
    while old.finish is None:
        step(batcher)
    assert step(batcher)[0][:2] == (2, 4)  # of its two full blocks the tail went, the head was still there
    assert new.cached_tokens == 0  # what it found at its first admission


def test_the_oldest_always_gets_on() -> None:
    batcher = make_batcher(num_blocks=3, max_sequences=3)
    sequences = [make_sequence(key, prompt(2, first=10 * key), max_tokens=10) for key in range(3)]
    add(batcher, *sequences)
    for _ in range(100):
        running = batcher.num_running + batcher.num_waiting
        if not running:
            break
        assert step(batcher)
    assert all(sequence.finish for sequence in sequences)
    assert batcher.counters.preemptions > 0


def test_a_newcomer_leaves_every_running_sequence_a_block() -> None:
    batcher = make_batcher(num_blocks=3)
    add(batcher, make_sequence(1, prompt(4)), make_sequence(2, prompt(8, first=50)))
    assert step(batcher) == [(1, 0, 4)]
    assert batcher.num_waiting == 1


def test_choices_wait_for_their_leader_and_share_its_prompt() -> None:
    batcher = make_batcher(max_batch_tokens=8)
    leader = make_sequence(1, prompt(13))
    follower = make_sequence(2, prompt(13), choice=1, leader=leader)
    other = make_sequence(3, prompt(2, first=50))
    add(batcher, leader, follower, other)
    assert step(batcher) == [(1, 0, 8)]
    assert step(batcher) == [(1, 8, 5), (3, 0, 2)]  # others need not wait with the follower
    assert step(batcher) == [(1, 13, 1), (3, 2, 1), (2, 12, 1)]
    assert follower.blocks[:3] == leader.blocks[:3]
    assert follower.cached_tokens == 12


def test_choices_do_not_wait_for_a_prompt_without_a_full_block() -> None:
    batcher = make_batcher()
    leader = make_sequence(1, prompt(4))
    add(batcher, leader, make_sequence(2, prompt(4), choice=1, leader=leader))
    assert step(batcher) == [(1, 0, 4), (2, 0, 4)]


def test_choices_do_not_wait_for_a_leader_that_is_gone() -> None:
    batcher = make_batcher(max_batch_tokens=8)
    leader = make_sequence(1, prompt(13))
    add(batcher, leader, make_sequence(2, prompt(13), choice=1, leader=leader))
    step(batcher)
    assert batcher.remove(1)
    assert step(batcher) == [(2, 8, 5)]  # what the leader had computed is not lost


def test_remove_frees_in_every_state() -> None:
    batcher = make_batcher(num_blocks=4, max_sequences=1, max_batch_tokens=6)
    add(batcher, make_sequence(1, prompt(9)), make_sequence(2, prompt(9)))
    step(batcher)
    assert batcher.pending_prefill_tokens == 3 + 9
    assert batcher.remove(1)  # in prefill
    assert batcher.remove(2)  # waiting
    assert not batcher.remove(1)
    assert (batcher.num_running, batcher.num_waiting, batcher.pending_prefill_tokens) == (0, 0, 0)
    add(batcher, make_sequence(3, prompt(15)))  # all four blocks
    assert step(batcher) == [(3, 4, 6)]


def test_forming_a_batch_twice_without_a_commit_gives_the_same() -> None:
    batcher = make_batcher(max_batch_tokens=6)
    add(batcher, make_sequence(1, prompt(1)), make_sequence(2, prompt(9, first=50)))
    first = summary(batcher.form_batch())
    assert summary(batcher.form_batch()) == first


def decoding(speculative_rows: int, *tokens: list[int], num_blocks: int = 64, max_tokens: int = 8) -> Batcher:
    """A batcher whose sequences, of such prompts, all decode."""
    batcher = make_batcher(num_blocks, max_batch_tokens=64, speculative_rows=speculative_rows)
    add(batcher, *(make_sequence(key, each, max_tokens) for key, each in enumerate(tokens)))
    step(batcher)
    return batcher


def drafts(batcher: Batcher) -> list[tuple[int, ...]]:
    return [piece.drafts for piece in batcher.form_batch().slices]


def test_decodes_share_the_rows_that_are_left_for_drafts() -> None:
    """All have said 7 last, and 7 7 before that, so 7 is what the drafts say."""
    sevens = [7] * 6
    assert drafts(decoding(0, sevens)) == drafts(decoding(1, sevens)) == [()]
    assert drafts(decoding(8, sevens)) == [(7, 7)]  # a first draft is short
    assert drafts(decoding(5, sevens, sevens)) == [(7,), (7,)]
    assert drafts(decoding(3, sevens, sevens)) == [(), ()]
    assert drafts(decoding(8, sevens, prompt(5, first=10))) == [(7, 7), ()]  # the other has no 7 but its last


def test_no_drafts_beside_a_prompt() -> None:
    batcher = decoding(8, [7] * 6)
    add(batcher, make_sequence("new", prompt(5)))
    assert drafts(batcher) == [(), ()]


def test_a_draft_ends_before_the_last_token_and_where_no_block_is_to_be_had() -> None:
    assert drafts(decoding(8, [7] * 6, max_tokens=3)) == [(7,)]
    assert drafts(decoding(8, [7] * 6, max_tokens=2)) == [()]
    assert drafts(decoding(8, [7] * 6, num_blocks=4)) == [(7, 7)]
    assert drafts(decoding(8, [7] * 6, num_blocks=3)) == [(7,)], "7 tokens, an eighth fits, and one block stays free"


def test_right_drafts_count_as_computed() -> None:
    batcher = decoding(8, [7] * 6)
    batch = batcher.form_batch()
    sequence = batch.slices[0].sequence
    assert (batch.slices[0].length, batch.slices[0].sampled_rows) == (3, 3)
    for token in (7, 9):
        sequence.append(token)
    batcher.commit(batch)
    assert (sequence.computed, sequence.uncomputed) == (8, 1)
    assert (batcher.counters.draft_tokens, batcher.counters.accepted_tokens, batcher.counters.decode_tokens) == (
        2,
        1,
        2,
    )
    assert len(sequence.hashes) == 2
