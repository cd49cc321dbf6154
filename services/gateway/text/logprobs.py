"""Log-probabilities of a choice's tokens, between the workers' messages and the callers' formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.v1.sampling_pb2 import Logprobs
from services.common.errors import RequestFailed
from services.gateway.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class DeltaLogprobs:
    """Of a delta's tokens, one by one."""

    values: Logprobs
    # Characters of the choice before each token, also where its text is held back. A token within a character begins
    # where that character does.
    offsets: list[int]
    # The bytes that a token reads as.
    spell: Callable[[int], bytes]

    def top(self, position: int) -> Sequence[tuple[int, float]]:
        """The likeliest (token id, log-probability) in the place of the token at that position in the delta."""
        count = len(self.values.top_ids) // len(self.values.token_logprobs)
        part = slice(position * count, (position + 1) * count)
        return list(zip(self.values.top_ids[part], self.values.top_logprobs[part], strict=True))


class LogprobReader:
    """Goes along with one choice.

    Its detokenizer is its own, so that choices without log-probabilities need not count characters token by token.
    """

    def __init__(self, detokenizer: Detokenizer, spell: Callable[[int], bytes]) -> None:
        self._detokenizer = detokenizer
        self._spell = spell
        self._length = 0

    def read(self, values: Logprobs | None, token_ids: Sequence[int]) -> DeltaLogprobs | None:
        """Those of a delta's tokens; what `values` has beyond them, a stop string has cut off.

        Raises RequestFailed if there are not enough.
        """
        if not token_ids:
            return None
        if values is None or len(values.token_logprobs) < len(token_ids):
            raise RequestFailed("The worker left out log-probabilities that this request asked for.")
        offsets = []
        for token_id in token_ids:
            offsets.append(self._length)
            self._length += len(self._detokenizer.push(token_id))
        return DeltaLogprobs(_first(values, len(token_ids)), offsets, self._spell)


def _first(values: Logprobs, tokens: int) -> Logprobs:
    had = len(values.token_logprobs)
    if had == tokens:
        return values
    top = len(values.top_ids) // had * tokens
    return Logprobs(
        token_logprobs=values.token_logprobs[:tokens],
        top_ids=values.top_ids[:top],
        top_logprobs=values.top_logprobs[:top],
    )
