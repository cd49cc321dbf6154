import logging
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from services.gateway.text.prompt_encoder import prompt_encoder
from tests.services.gateway.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

# What tokenizers treat in ways of their own, beside any text.
_SPECIAL = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "'s",
    "12",
    "<|im_start|>",
    "<|im_end|>",
    "né plain",
    "né",
    "e\u0301",
    "👩\u200d👧",
]
PIECES = st.sampled_from(_SPECIAL)
TEXTS = st.lists(PIECES | st.text(max_size=12), max_size=12).map("".join)


def unigram_tokenizer() -> Tokenizer:
    """As T5 has it: fastokens does not take it."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁a", -1.5)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    return tokenizer


def tokenizer_with_a_bos() -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    start = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{start[0]} $A", special_tokens=[start]
    )
    return tokenizer


encoder_of = cache(prompt_encoder)


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level_tokenizer(), byte_fallback_tokenizer(), tokenizer_with_a_bos(), unigram_tokenizer()],
    ids=["byte level", "byte fallback", "with a BOS", "unigram"],
)
@given(data=st.data())
def test_the_ids_are_those_of_tokenizers(tokenizer: Tokenizer, data: st.DataObject) -> None:
    encode = encoder_of(tokenizer)
    for special in (False, True):
        text = data.draw(TEXTS)
        assert encode(text, special) == tokenizer.encode(text, add_special_tokens=special).ids


def test_the_ids_of_the_default_model_are_those_of_tokenizers(default_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    encode = prompt_encoder(tokenizer)

    @settings(max_examples=1000)
    @given(text=TEXTS)
    def check(text: str) -> None:
        assert encode(text, False) == tokenizer.encode(text, add_special_tokens=False).ids

    check()
    for text in (" " * 1_000_000, "a" * 100_000):
        assert encode(text, False) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (unigram_tokenizer(), "does not take this tokenizer"),
        # Without a token for what it does not know, `tokenizers` leaves that out.
        (Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])), "in another way"),
        # It has pieces that no merge leads to.
        (byte_fallback_tokenizer(), "in another way"),
    ],
    ids=["unigram", "without an unknown token", "byte fallback"],
)
def test_what_fastokens_reads_differently_is_left_to_tokenizers(
    tokenizer: Tokenizer, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        prompt_encoder(tokenizer)
    assert reason in caplog.text


def test_fastokens_reads_the_default_model(default_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        prompt_encoder(Tokenizer.from_file(str(default_model / "tokenizer.json")))
    assert "fastokens" not in caplog.text
