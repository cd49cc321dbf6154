"""A batch flattened to the arrays that the compiled step reads."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.plan import plan_step
from tests.services.worker.engine.tiny_models import make_sequence

BLOCK_SIZE = 4


def test_a_decode_beside_a_chunk_of_a_prompt() -> None:
    decode = make_sequence([10, 11, 12, 13, 14], [7, 2])
    prompt = make_sequence([20, 21, 22, 23, 24, 25, 26], [5, 9])
    plan = plan_step(Batch((Slice(decode, 4, 1), Slice(prompt, 2, 3))), BLOCK_SIZE)
    assert plan.tokens == [14, 22, 23, 24]
    assert plan.positions == [4, 2, 3, 4]
    assert plan.row_blocks == [2, 5, 5, 9]
    assert plan.first_rows == [0, 1, 4]
    assert plan.table_starts == [0, 2]
    assert plan.tables == [7, 2, 5, 9]
    assert plan.sampled_rows == [0], "the prompt is not at its end"
    assert plan.longest_context == 5


def test_drafts_follow_the_last_token_and_sample_too() -> None:
    sequence = make_sequence([10, 11, 12, 13, 14], [7, 2])
    plan = plan_step(Batch((Slice(sequence, 4, 3, (30, 31)), Slice(sequence, 4, 1))), BLOCK_SIZE)
    assert plan.tokens == [14, 30, 31, 14]
    assert plan.positions == [4, 5, 6, 4]
    assert plan.row_blocks == [2, 2, 2, 2]
    assert plan.sampled_rows == [0, 1, 2, 3]
    assert plan.longest_context == 7


def test_blocks_beyond_the_slice_are_left_out() -> None:
    sequence = make_sequence(list(range(12)), [3, 1, 8])
    plan = plan_step(Batch((Slice(sequence, 0, 4),)), BLOCK_SIZE)
    assert plan.tables == [3]
    assert plan.sampled_rows == []


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=6), st.data()
)
def test_every_row_finds_its_token_position_and_block(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    slices = []
    for start, length, left in parts:
        size = start + length + left
        blocks = data.draw(st.permutations(range(-(-size // BLOCK_SIZE) + 3)))[: -(-size // BLOCK_SIZE)]
        slices.append(Slice(make_sequence(list(range(size)), blocks), start, length))
    plan = plan_step(Batch(tuple(slices)), BLOCK_SIZE)
    assert plan.first_rows[-1] == len(plan.tokens) == sum(length for _, length, _ in parts)
    for index, part in enumerate(slices):
        rows = slice(plan.first_rows[index], plan.first_rows[index + 1])
        positions = range(part.start, part.start + part.length)
        assert plan.positions[rows] == list(positions)
        assert plan.tokens[rows] == [part.sequence.tokens[position] for position in positions]
        table = plan.tables[plan.table_starts[index] :]
        assert plan.row_blocks[rows] == [table[position // BLOCK_SIZE] for position in positions]
    last_rows = [plan.first_rows[i + 1] - 1 for i, part in enumerate(slices) if part.samples]
    assert plan.sampled_rows == last_rows
    assert plan.longest_context == max(start + length for start, length, _ in parts)
