from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.gateway.text.detokenizer import ByteLevelDetokenizer, DetokenizerFactory, WindowDetokenizer
from tests.services.gateway.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
# Beyond the vocabulary too: a model's logits are often wider than its tokenizer.
any_byte_level_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 4), max_size=60)


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = DetokenizerFactory(tokenizer).create()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def window_pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = WindowDetokenizer(tokenizer, special_ids(tokenizer))
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def test_byte_level_tokenizers_get_the_table() -> None:
    assert isinstance(DetokenizerFactory(BYTE_LEVEL).create(), ByteLevelDetokenizer)
    assert isinstance(DetokenizerFactory(BYTE_FALLBACK).create(), WindowDetokenizer)


@given(any_byte_level_ids)
def test_joined_pieces_are_the_decoded_whole(token_ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


@given(any_byte_level_ids)
def test_the_window_agrees_with_the_table(token_ids: list[int]) -> None:
    assert "".join(window_pieces(BYTE_LEVEL, token_ids)) == "".join(pieces(BYTE_LEVEL, token_ids))


@given(st.text(max_size=30))
def test_no_piece_of_a_valid_text_has_half_a_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    token_ids = BYTE_LEVEL.encode(text).ids
    for found in (pieces(BYTE_LEVEL, token_ids), window_pieces(BYTE_LEVEL, token_ids)):
        assert "\ufffd" not in "".join(found)
        assert all(text.startswith("".join(found[:end])) for end in range(len(found) + 1))


@given(st.lists(st.sampled_from(["▁hello", "▁world", "▁", "a", "b", "▁€", "né", "</s>", "€", "日", "🦊"]), max_size=20))
def test_byte_fallback_tokenizers_are_decoded_exactly(words: list[str]) -> None:
    token_ids: list[int] = []
    for word in words:
        whole = BYTE_FALLBACK.token_to_id(word)
        as_bytes = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in word.encode()]
        token_ids += as_bytes if whole is None else [whole]
    assert "".join(pieces(BYTE_FALLBACK, token_ids)) == BYTE_FALLBACK.decode(token_ids, skip_special_tokens=True)


def test_a_character_in_four_tokens_comes_with_the_last() -> None:
    fox = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    assert pieces(BYTE_FALLBACK, fox) == ["", "", "", "🦊", ""]
    fox = BYTE_LEVEL.encode("🦊").ids
    assert len(fox) == 4
    assert pieces(BYTE_LEVEL, fox) == ["", "", "", "🦊", ""]


def test_a_character_that_stays_incomplete_reads_as_replacement() -> None:
    fox = BYTE_LEVEL.encode("🦊").ids
    assert pieces(BYTE_LEVEL, fox[:2]) == ["", "", "\ufffd"]


def test_special_tokens_have_no_text() -> None:
    end = BYTE_LEVEL.token_to_id("<|im_end|>")
    assert pieces(BYTE_LEVEL, [*BYTE_LEVEL.encode("hi").ids, end])[-2:] == ["", ""]


class Counting:
    """A tokenizer that remembers how many ids it decoded at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.most = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.most = max(self.most, len(token_ids))
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def test_tokens_without_text_are_not_decoded_again_with_each_that_follows() -> None:
    end = BYTE_LEVEL.token_to_id("<|im_end|>")
    word = BYTE_LEVEL.encode(" mill").ids
    counting = Counting(BYTE_LEVEL)
    detokenizer = WindowDetokenizer(counting, special_ids(BYTE_LEVEL))  # type: ignore[arg-type]
    texts = [detokenizer.push(token_id) for token_id in (*word, *[end] * 200, *word)]
    assert "".join(texts) + detokenizer.flush() == BYTE_LEVEL.decode([*word, *word], skip_special_tokens=True)
    assert counting.most < 10
