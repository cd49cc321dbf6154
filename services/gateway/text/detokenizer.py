"""Text from token ids as they come, one detokenizer per choice.

The joined text equals the tokenizer's `decode` of all ids, special tokens left out, however the ids were split; no
piece ends in half a character. Two ways, by the tokenizer's decoder:

- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): every token is a fixed run of bytes, so a table and an incremental
  UTF-8 decoder do it in constant time per token;
- any other: decode a window of ids twice, with and without the new ones, and deliver the difference once it ends in a
  whole character (the method of vLLM and TGI). With byte-fallback decoders a delivered character stays delivered,
  also if later bytes turn the run it came from into an invalid one.

Knows no stop strings and no requests.
"""

import codecs
from collections.abc import Sequence, Set
from typing import Protocol

from tokenizers import Tokenizer, decoders

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns one choice's ids into text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """What is left when no more tokens come: an incomplete character reads U+FFFD."""


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer and holds what they share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # None unless it is byte-level.
        self.token_bytes = TokenBytes(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._token_texts = None if self.token_bytes is None else TokenTexts(self.token_bytes)
        self._special = _special_ids(tokenizer)

    def create(self) -> Detokenizer:
        if self._token_texts is not None:
            return ByteLevelDetokenizer(self._token_texts)
        return WindowDetokenizer(self._tokenizer, self._special)


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level tokenizer, filled as they are asked for. Special tokens have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._byte_of = _byte_alphabet()
        self._special = _special_ids(tokenizer)

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        self[token_id] = found = b"" if token is None else self._encode(token)
        return found

    def _encode(self, token: str) -> bytes:
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token is plain text, not written in the byte alphabet
            return token.encode()


class TokenTexts(dict[int, str | None]):
    """The text of each token that is whole characters; None for the others. Filled as they are asked for."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self.token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self.token_bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class ByteLevelDetokenizer:
    """Joins the bytes of tokens through an incremental UTF-8 decoder, where they are not whole characters anyway."""

    __slots__ = ("_decoder", "_texts", "_whole")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        # Made for the first token that needs it.
        self._decoder: codecs.IncrementalDecoder | None = None
        # The decoder holds no part of a character.
        self._whole = True

    def push(self, token_id: int) -> str:
        if self._whole and (text := self._texts[token_id]) is not None:
            return text
        if self._decoder is None:
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = self._decoder.decode(self._texts.token_bytes[token_id])
        self._whole = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", True)


class WindowDetokenizer:
    """Decodes the ids since the last delivery, with those of that delivery before them as context."""

    __slots__ = ("_context", "_context_text", "_pending", "_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, special: Set[int]) -> None:
        """`special`: tokens without text. Decoding skips them; kept, each would be decoded with all that follow."""
        self._tokenizer = tokenizer
        self._special = special
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if len(text) <= len(self._context_text) or text.endswith(_REPLACEMENT):
            return ""
        return self._deliver(text)

    def flush(self) -> str:
        return self._deliver(self._decode(self._context + self._pending))

    def _deliver(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: the byte itself where printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}
