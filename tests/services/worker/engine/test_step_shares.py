from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.batcher import Slice
from services.worker.engine.step_shares import charge
from tests.fakes import make_sequence

PROMPT = 8
Span = tuple[int, int, tuple[int, ...]]  # start, length, drafts
DRAFTED = st.builds(
    lambda start, drafts: (start, 1 + drafts, (1,) * drafts), st.integers(PROMPT, 24), st.integers(1, 7)
)
PLAIN = st.tuples(st.integers(0, 3 * PROMPT), st.integers(1, 600), st.just(()))
SLICES = st.lists(PLAIN | DRAFTED, min_size=1, max_size=64)


def slice_of(start: int, length: int, drafts: tuple[int, ...] = ()) -> Slice:
    return Slice(make_sequence(object(), [1] * PROMPT), start, length, drafts)


@given(SLICES, st.integers(0, 10**12))
def test_shares_add_up_to_the_step_and_follow_the_tokens(spans: list[Span], step_ns: int) -> None:
    slices = [slice_of(*span) for span in spans]
    prefill_ns, decode_ns = charge(slices, step_ns)
    assert prefill_ns + decode_ns == step_ns
    assert prefill_ns == sum(piece.sequence.prefill_ns for piece in slices)
    assert decode_ns == sum(piece.sequence.decode_ns for piece in slices)
    tokens = sum(piece.length for piece in slices)
    for piece in slices:
        share = piece.sequence.prefill_ns + piece.sequence.decode_ns
        assert abs(share - step_ns * piece.length / tokens) <= tokens + step_ns * 1e-15  # a nanosecond per token
        assert not (piece.sequence.prefill_ns and piece.sequence.decode_ns)


@given(st.lists(st.tuples(SLICES, st.integers(0, 10**9)), min_size=1, max_size=8))
def test_steps_add_up_in_their_sequences(steps: list[tuple[list[Span], int]]) -> None:
    sequences = [make_sequence(index, [1] * PROMPT) for index in range(64)]
    for spans, step_ns in steps:
        charge([Slice(sequence, *span) for sequence, span in zip(sequences, spans, strict=False)], step_ns)
    charged = sum(sequence.prefill_ns + sequence.decode_ns for sequence in sequences)
    assert charged == sum(step_ns for _, step_ns in steps)


def test_drafts_are_decode_right_or_wrong() -> None:
    drafted, plain = slice_of(PROMPT, 3, (5, 6)), slice_of(PROMPT, 1)
    assert charge([drafted, plain], 4_000) == (0, 4_000)
    assert (drafted.sequence.decode_ns, plain.sequence.decode_ns) == (3_000, 1_000)


def test_one_output_token_is_decode_and_all_else_prefill() -> None:
    decode, last_of_prompt, again = slice_of(PROMPT, 1), slice_of(PROMPT - 1, 1), slice_of(0, 2 * PROMPT)
    prefill_ns, decode_ns = charge([decode, last_of_prompt, again], 18_007)
    assert (decode_ns, prefill_ns) == (1_000, 17_007)
    assert decode.sequence.decode_ns == 1_000
    assert last_of_prompt.sequence.prefill_ns == 1_000
    assert again.sequence.prefill_ns == 16_007
