from hypothesis import given
from hypothesis import strategies as st

from headrace.v1.sampling_pb2 import FinishReason, Stopping
from services.gateway.request import Delta
from services.gateway.text.choice import Choice
from services.gateway.text.detokenizer import DetokenizerFactory
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
FACTORY = DetokenizerFactory(TOKENIZER)
NONE, STOP, LENGTH = (
    FinishReason.FINISH_REASON_UNSPECIFIED,
    FinishReason.FINISH_REASON_STOP,
    FinishReason.FINISH_REASON_LENGTH,
)


def run(token_ids: list[int], cuts: list[int], stopping: Stopping) -> tuple[list[Delta], Choice]:
    """Deltas of a choice that gets its tokens in runs of these lengths, the rest at once and as the last ones."""
    choice = Choice(0, FACTORY.create(), stopping)
    deltas = []
    begin = 0
    for length in cuts:
        if not choice.finished:
            deltas.append(choice.advance(token_ids[begin : begin + length], NONE))
            begin += length
    if not choice.finished:
        deltas.append(choice.advance(token_ids[begin:], LENGTH))
    return deltas, choice


@given(
    st.text("ab é🦊", max_size=30),
    st.lists(st.integers(0, 5), max_size=8),
    st.lists(st.text("ab é🦊", min_size=1, max_size=3), max_size=2),
    st.integers(0, 6),
)
def test_how_tokens_are_cut_into_steps_changes_nothing(
    text: str, cuts: list[int], stops: list[str], min_tokens: int
) -> None:
    token_ids = TOKENIZER.encode(text).ids
    stopping = Stopping(stop=stops, min_tokens=min_tokens)
    deltas, choice = run(token_ids, cuts, stopping)
    one_by_one, reference = run(token_ids, [1] * len(token_ids), stopping)
    assert "".join(delta.text for delta in deltas) == "".join(delta.text for delta in one_by_one)
    assert choice.token_ids == reference.token_ids
    assert choice.finish_reason == reference.finish_reason
    assert [delta.seq for delta in deltas] == list(range(len(deltas)))
    assert [token_id for delta in deltas for token_id in delta.token_ids] == choice.token_ids
    offset = 0
    for delta in deltas:
        assert delta.text_offset == offset
        offset += len(delta.text)
    if not stops:
        assert "".join(delta.text for delta in deltas) == text


def test_tokens_after_a_stop_string_do_not_count() -> None:
    token_ids = TOKENIZER.encode("one STOP two three").ids
    deltas, choice = run(token_ids, [], Stopping(stop=["STOP"]))
    assert [delta.text for delta in deltas] == ["one "]
    assert choice.finish_reason == STOP
    assert TOKENIZER.decode(choice.token_ids).endswith("STOP")


def test_stop_strings_wait_for_min_tokens() -> None:
    token_ids = TOKENIZER.encode("aXbXc").ids
    deltas, _ = run(token_ids, [1] * len(token_ids), Stopping(stop=["X"], min_tokens=3))
    assert "".join(delta.text for delta in deltas) == "aXb"


@given(st.integers(1, 12), st.lists(st.integers(0, 5), max_size=8))
def test_nothing_is_taken_beyond_max_tokens(max_tokens: int, cuts: list[int]) -> None:
    token_ids = TOKENIZER.encode("abcdefgh").ids
    deltas, choice = run(token_ids, cuts, Stopping(max_tokens=max_tokens))
    assert choice.token_ids == token_ids[:max_tokens]
    assert choice.finish_reason == LENGTH
    assert "".join(delta.text for delta in deltas) == "abcdefgh"[:max_tokens]


def test_the_last_token_may_end_it_for_another_reason() -> None:
    choice = Choice(0, FACTORY.create(), Stopping(max_tokens=2))
    choice.advance([1], NONE)
    assert choice.advance([2], STOP).finish_reason == STOP


def test_delivered_ids_are_packed_little_endian() -> None:
    choice = Choice(0, FACTORY.create(), Stopping())
    choice.advance([1, 258], NONE)
    assert choice.delivered_ids() == b"\x01\x00\x00\x00\x02\x01\x00\x00"
