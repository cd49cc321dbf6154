"""Small tokenizers made on the spot, and the bundle that a worker would hand out for them."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_WORDS = "Once upon a time the quick brown fox jumps over the lazy dog. Paris is the capital of France. hello world "


@cache
def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE like GPT-2's: any text, 300 and some tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS * 3], trainer)
    tokenizer.add_tokens([AddedToken("né plain", special=False)])
    return tokenizer


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """A SentencePiece-like BPE as in Llama 2: words with a leading mark, and bytes for all else."""
    words = ["▁hello", "▁world", "▁", "a", "b", "▁€", "né"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def bundle(**changes: object) -> dict[str, bytes]:
    """The files of the byte-level tokenizer's bundle."""
    tokenizer = byte_level_tokenizer()
    description: dict[str, object] = {
        "chat_template": CHAT_TEMPLATE,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "eos_token_ids": [tokenizer.token_to_id("<|im_end|>")],
        "add_bos": False,
        "vocabulary_size": tokenizer.get_vocab_size(),
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "headrace_tokenizer.json": json.dumps(description | changes).encode(),
    }
