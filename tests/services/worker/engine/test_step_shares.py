from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.batcher import Slice
from services.worker.engine.step_shares import charge
from tests.fakes import make_sequence

PROMPT = 8
SLICES = st.lists(st.tuples(st.integers(0, 3 * PROMPT), st.integers(1, 600)), min_size=1, max_size=64)


def slice_of(start: int, length: int) -> Slice:
    sequence = make_sequence(object(), [1] * PROMPT)
    return Slice(sequence, start, length)


@given(SLICES, st.integers(0, 10**12))
def test_shares_add_up_to_the_step_and_follow_the_tokens(spans: list[tuple[int, int]], step_ns: int) -> None:
    slices = [slice_of(start, length) for start, length in spans]
    prefill_ns, decode_ns = charge(slices, step_ns)
    assert prefill_ns + decode_ns == step_ns
    assert prefill_ns == sum(piece.sequence.prefill_ns for piece in slices)
    assert decode_ns == sum(piece.sequence.decode_ns for piece in slices)
    tokens = sum(piece.length for piece in slices)
    for piece in slices:
        share = piece.sequence.prefill_ns + piece.sequence.decode_ns
        assert abs(share * tokens - step_ns * piece.length) < tokens  # less than a nanosecond off
        assert not (piece.sequence.prefill_ns and piece.sequence.decode_ns)


@given(st.lists(st.tuples(SLICES, st.integers(0, 10**9)), min_size=1, max_size=8))
def test_steps_add_up_in_their_sequences(steps: list[tuple[list[tuple[int, int]], int]]) -> None:
    sequences = [make_sequence(index, [1] * PROMPT) for index in range(64)]
    for spans, step_ns in steps:
        charge([Slice(sequence, *span) for sequence, span in zip(sequences, spans, strict=False)], step_ns)
    charged = sum(sequence.prefill_ns + sequence.decode_ns for sequence in sequences)
    assert charged == sum(step_ns for _, step_ns in steps)


def test_one_output_token_is_decode_and_all_else_prefill() -> None:
    decode, last_of_prompt, again = slice_of(PROMPT, 1), slice_of(PROMPT - 1, 1), slice_of(0, 2 * PROMPT)
    prefill_ns, decode_ns = charge([decode, last_of_prompt, again], 18_000)
    assert (decode_ns, prefill_ns) == (1_000, 17_000)
    assert decode.sequence.decode_ns == 1_000
    assert last_of_prompt.sequence.prefill_ns == 1_000
    assert again.sequence.prefill_ns == 16_000
