"""What single tokens read as: every token, special ones included, as it would stand in the middle of a text."""

import re
from functools import lru_cache

from tokenizers import Tokenizer

from services.gateway.text.detokenizer import TokenBytes

_REMEMBERED = 16_384
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class TokenSpelling:
    """Of one tokenizer. `bytes_of` gives a token's bytes, which need not be whole characters."""

    def __init__(self, tokenizer: Tokenizer, token_bytes: TokenBytes | None) -> None:
        """`token_bytes`: the table of a byte-level tokenizer; any other's decoder is asked."""
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token_id: token.content.encode() for token_id, token in added if token.special}
        self._before = [next((i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]).strip()), 0)]
        self._text_before = tokenizer.decode(self._before)
        self.bytes_of = lru_cache(_REMEMBERED)(self._spell)

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._special:
            return self._special[token_id]
        if self._token_bytes is not None:
            return self._token_bytes[token_id]
        if byte := _BYTE_FALLBACK.fullmatch(self._tokenizer.id_to_token(token_id) or ""):
            return bytes.fromhex(byte[1])
        # After another token, since decoders take the space away that begins a text.
        text: str = self._tokenizer.decode([*self._before, token_id])
        return text.removeprefix(self._text_before).encode()
