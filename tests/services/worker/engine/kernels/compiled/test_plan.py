"""A batch flattened to the arrays that the compiled step reads."""

import numpy as np
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
    assert plan.tokens.tolist() == [14, 22, 23, 24]
    assert plan.positions.tolist() == [4, 2, 3, 4]
    assert plan.row_blocks.tolist() == [2, 5, 5, 9]
    assert plan.first_rows.tolist() == [0, 1, 4]
    assert plan.table_starts.tolist() == [0, 2]
    assert plan.tables.tolist() == [7, 2, 5, 9]
    assert plan.sampled_rows.tolist() == [0], "the prompt is not at its end"
    assert plan.longest_context == 5


def test_blocks_beyond_the_slice_are_left_out() -> None:
    sequence = make_sequence(list(range(12)), [3, 1, 8])
    plan = plan_step(Batch((Slice(sequence, 0, 4),)), BLOCK_SIZE)
    assert plan.tables.tolist() == [3]
    assert plan.sampled_rows.tolist() == []


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
        positions = np.arange(part.start, part.start + part.length)
        assert (plan.positions[rows] == positions).all()
        assert (plan.tokens[rows] == np.array(part.sequence.tokens)[positions]).all()
        table = plan.tables[plan.table_starts[index] :]
        assert (table[positions // BLOCK_SIZE] == plan.row_blocks[rows]).all()
    last_rows = [plan.first_rows[i + 1] - 1 for i, part in enumerate(slices) if part.samples]
    assert plan.sampled_rows.tolist() == last_rows
    assert plan.longest_context == max(start + length for start, length, _ in parts)
