"""Text to token ids, with fastokens where it agrees with `tokenizers`, whose ids are the ones that models know.

fastokens takes a sixth of the time for a chat of 170 tokens, and less for long prompts. It does not take every
tokenizer, and reads pieces of a vocabulary that no merge leads to in a way of its own. So it is tried first: on texts
of many kinds, and on every piece of the vocabulary (0.5 s for 50,000).
"""

import itertools
import logging
from collections.abc import Callable

import fastokens
from tokenizers import Tokenizer

log = logging.getLogger(__name__)

Encode = Callable[[str, bool], list[int]]
"""Token ids of a text; True: with the special tokens that the tokenizer puts around it. Other threads run meanwhile."""

_SCRIPTS = "The mill's wheel, it'S 1,234.5e-6 times wétter — 水車が回る。 Водяное колесо; عجلة مائية; จักรน้ำ; 물레방아\n"
_SPACES = " a  b   c\td\r\ne\n\n f\u00a0g\u3000h \n  i\u2028j\u200dk  "
_COMPOSED = "é e\u0301 ﬁ Ⅷ ½ ٣ ß İ ǆ \u1100\u1161\u11a8 👩‍👩‍👧🇩🇪 \U0001d518 \x00\x7f\ufffd\ufeff"
_CODE = "def f(x):\n\tif x>=0x1F and s!='':\n\t\treturn {\"a\":[1,2]}  # <b>&amp;</b> https://a.b/c?d=e_f\n"
_TEXTS = ("", " ", "a", "  ", "\n", _SCRIPTS, _SPACES, _COMPOSED, _CODE, _SCRIPTS + _SPACES + _COMPOSED + _CODE)
_TRIED_AT_ONCE = 1000


def prompt_encoder(tokenizer: Tokenizer) -> Encode:
    """The fastest way that gives this tokenizer's own ids."""
    try:
        fast = fastokens.Tokenizer.from_json_str(tokenizer.to_str())
        differing = _first_difference(fast, tokenizer)
    except ValueError as error:
        log.info("fastokens does not take this tokenizer: %s", error)
        return _with_tokenizers(tokenizer)
    if differing is not None:
        log.warning("fastokens would read %r in another way: this tokenizer does without", differing)
        return _with_tokenizers(tokenizer)
    return _with_fastokens(fast, _with_tokenizers(tokenizer))


def _with_fastokens(tokenizer: fastokens.Tokenizer, otherwise: Encode) -> Encode:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens).ids
        except ValueError:  # its regular expressions have a stack that a million spaces, for one, do not fit in
            return otherwise(text, add_special_tokens)
        return ids

    return encode


def _with_tokenizers(tokenizer: Tokenizer) -> Encode:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # Only the batch call lets other threads run.
        return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    return encode


def _first_difference(fast: fastokens.Tokenizer, tokenizer: Tokenizer) -> str | None:
    """A text of which the ids differ, if one is found."""
    texts = _texts(tokenizer)
    pieces = _pieces(tokenizer)
    groups = itertools.chain(
        [(texts, True)], ((pieces[i : i + _TRIED_AT_ONCE], False) for i in range(0, len(pieces), _TRIED_AT_ONCE))
    )
    for group, special in groups:
        expected = tokenizer.encode_batch_fast(group, add_special_tokens=special)
        for text, ours, theirs in zip(group, fast.encode_batch(group, special), expected, strict=True):
            if ours.ids != theirs.ids:
                return text
    return None


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of many kinds, also around and between the tokenizer's added tokens."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return [*_TEXTS, *(f"a {content}b{content} \n{content}" for content in added), _SCRIPTS.join(added)]


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """What each token of the vocabulary reads as; with the mark of a word's begin, which decoders take away."""
    spelled = tokenizer.get_vocab(with_added_tokens=False)
    decoded = tokenizer.decode_batch([[token_id] for token_id in spelled.values()])
    return [piece if "▁" in piece else text for piece, text in zip(spelled, decoded, strict=True)]
