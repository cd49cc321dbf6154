import torch

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.step_inputs import StepInputs, build_step_inputs
from tests.services.worker.engine.tiny_models import make_sequence

CPU = torch.device("cpu")


def build(*slices: Slice) -> StepInputs:
    return build_step_inputs(Batch(slices), 4, CPU)


def test_rows_are_the_slices_tokens_in_order() -> None:
    decoding = make_sequence([1, 2, 3, 4, 5, 6], [7, 3])
    prefilling = make_sequence([10, 11, 12, 13, 14, 15, 16], [5, 6])
    step = build(Slice(decoding, 5, 1), Slice(prefilling, 2, 4))
    assert step.tokens.tolist() == [6, 12, 13, 14, 15]
    assert step.positions.tolist() == [5, 2, 3, 4, 5]
    assert step.slot_blocks.tolist() == [3, 5, 5, 6, 6]
    assert step.slot_offsets.tolist() == [1, 2, 3, 0, 1]
    assert step.sampled_rows.tolist() == [0]


def test_drafts_follow_the_last_token_and_sample_too() -> None:
    step = build(Slice(make_sequence([1, 2, 3, 4, 5, 6], [7, 3]), 5, 3, (30, 31)))
    assert step.tokens.tolist() == [6, 30, 31]
    assert step.positions.tolist() == [5, 6, 7]
    assert step.sampled_rows.tolist() == [0, 1, 2]


def test_blocks_that_a_step_begins_and_does_not_fill() -> None:
    sequence = make_sequence([0] * 12, [7, 3, 9])
    for start, length, begun in [
        (0, 3, [7]),
        (0, 4, []),
        (0, 9, [9]),
        (4, 1, [3]),
        (5, 2, []),
        (7, 1, []),
        (6, 3, [9]),
    ]:
        assert build(Slice(sequence, start, length)).begun_blocks.tolist() == begun


def test_a_step_may_sample_nothing() -> None:
    assert build(Slice(make_sequence([1, 2, 3], [0]), 0, 2)).sampled_rows.shape == (0,)


def test_decodes_share_a_group_unless_padding_would_more_than_double_their_keys() -> None:
    blocks = (1, 2, 3, 4, 5, 8, 9)
    sequences = [make_sequence([0] * (4 * count), list(range(count))) for count in blocks]
    step = build(*(Slice(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences))
    assert [group.tables.shape[1] for group in step.groups] == [1, 2, 4, 8, 9]
    assert [group.slices for group in step.groups] == [1, 1, 2, 2, 1]
    for group in step.groups:
        assert group.context_length == 4 * group.tables.shape[1]


def test_a_shorter_table_is_padded_with_its_own_block_and_not_with_anothers() -> None:
    longer, shorter = make_sequence([0] * 16, [0, 1, 2, 3]), make_sequence([0] * 12, [7, 8, 9])
    (group,) = build(Slice(longer, 15, 1), Slice(shorter, 11, 1)).groups
    assert group.tables.tolist() == [[0, 1, 2, 3], [7, 8, 9, 9]]


def test_bias_hides_the_future_and_what_left_the_window() -> None:
    (group,) = build(Slice(make_sequence([0] * 6, [0, 1]), 2, 3)).groups
    seen = group.bias(None, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    seen = group.bias(2, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_bias_is_skipped_only_where_it_would_hide_nothing_that_plain_attention_shows() -> None:
    (fresh,) = build(Slice(make_sequence([0] * 6, [0, 1]), 0, 5)).groups
    assert fresh.is_plain_causal(None)
    assert fresh.is_plain_causal(5)
    assert not fresh.is_plain_causal(4)
    (resumed,) = build(Slice(make_sequence([0] * 6, [0, 1]), 1, 5)).groups
    assert not resumed.is_plain_causal(None)
    (decode,) = build(Slice(make_sequence([0] * 6, [0, 1]), 5, 1)).groups
    assert decode.sees_everything(None)
    assert decode.sees_everything(6)
    assert not decode.sees_everything(5)
