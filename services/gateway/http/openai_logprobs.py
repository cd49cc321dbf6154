"""Log-probabilities in the shapes of OpenAI's two completion APIs.

A token that is no whole characters is written with its bytes escaped: as `\\xf0\\x9f` in chats, after `bytes:` in
completions, where tokens are keys.
"""

from collections.abc import Iterable

import msgspec

from services.gateway.request import Delta
from services.gateway.text.logprobs import DeltaLogprobs

# JSON has no infinity; OpenAI and vLLM write this.
_LEAST = -9999.0


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    # At most the number asked for, and the token itself.
    top_logprobs: list[dict[str, float]]


def chat_logprobs(deltas: Iterable[Delta]) -> ChatLogprobs | None:
    """Those of a choice's deltas; None if they have none."""
    content = []
    for logprobs, _, token_id, value, tops in _tokens(deltas):
        top = [TopLogprob(*_chat_entry(logprobs, *one)) for one in tops]
        content.append(TokenLogprob(*_chat_entry(logprobs, token_id, value), top))
    return ChatLogprobs(content) if content else None


def completion_logprobs(deltas: Iterable[Delta]) -> CompletionLogprobs | None:
    """Those of a choice's deltas; None if they have none."""
    whole = CompletionLogprobs([], [], [], [])
    for logprobs, offset, token_id, value, tops in _tokens(deltas):
        token = _name(logprobs.spell(token_id))
        whole.text_offset.append(offset)
        whole.token_logprobs.append(value)
        whole.tokens.append(token)
        likeliest = {_name(logprobs.spell(top)): likelihood for top, likelihood in tops}
        whole.top_logprobs.append(likeliest | {token: value})
    return whole if whole.tokens else None


def _tokens(
    deltas: Iterable[Delta],
) -> Iterable[tuple[DeltaLogprobs, int, int, float, list[tuple[int, float]]]]:
    """Each token's offset, id and log-probability, and the likeliest in its place."""
    for delta in deltas:
        if (logprobs := delta.logprobs) is None:
            continue
        for position, token_id in enumerate(delta.token_ids):
            value = max(_LEAST, logprobs.values.token_logprobs[position])
            tops = [(top, max(_LEAST, likelihood)) for top, likelihood in logprobs.top(position)]
            yield logprobs, logprobs.offsets[position], token_id, value, tops


def _chat_entry(logprobs: DeltaLogprobs, token_id: int, value: float) -> tuple[str, float, list[int]]:
    spelled = logprobs.spell(token_id)
    return spelled.decode("utf-8", "backslashreplace"), value, list(spelled)


def _name(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
