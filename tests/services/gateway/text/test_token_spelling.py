import pytest
from tokenizers import Tokenizer

from services.gateway.text.detokenizer import DetokenizerFactory
from services.gateway.text.token_spelling import TokenSpelling
from tests.services.gateway.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer


def spelling(tokenizer: Tokenizer) -> TokenSpelling:
    return TokenSpelling(tokenizer, DetokenizerFactory(tokenizer).token_bytes)


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["level", "fallback"])
@pytest.mark.parametrize("text", ["hello world", "né plain", "a € 🦊", ""])
def test_tokens_spell_the_text_together(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    spelled = b"".join(map(spelling(tokenizer).bytes_of, ids)).decode()
    assert spelled.replace("▁", " ") == text


def test_what_begins_a_word_keeps_its_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    assert spelling(tokenizer).bytes_of(tokenizer.token_to_id("▁world")) == b" world"


def test_parts_of_characters_are_their_bytes() -> None:
    level, fallback = byte_level_tokenizer(), byte_fallback_tokenizer()
    assert list(map(spelling(level).bytes_of, level.encode("🦊").ids)) == [b"\xf0", b"\x9f", b"\xa6", b"\x8a"]
    assert spelling(fallback).bytes_of(fallback.token_to_id("<0xE2>")) == b"\xe2"


def test_special_tokens_are_seen() -> None:
    level, fallback = byte_level_tokenizer(), byte_fallback_tokenizer()
    assert spelling(level).bytes_of(level.token_to_id("<|im_end|>")) == b"<|im_end|>"
    assert spelling(fallback).bytes_of(fallback.token_to_id("</s>")) == b"</s>"
