"""One choice of a request: its tokens, and the text the client gets of them. Knows no worker and no queue."""

import sys
from collections.abc import Sequence

from headrace.v1.sampling_pb2 import FinishReason, Logprobs, Stopping
from services.gateway.request import Delta, pack_ids
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.logprobs import LogprobReader
from services.gateway.text.stop_strings import StopMatcher

_UNFINISHED = FinishReason.FINISH_REASON_UNSPECIFIED


class Choice:
    """Grows by tokens until it has a finish reason. An attempt that breaks off leaves it as it is, for the next."""

    __slots__ = (
        "_detokenizer",
        "_echo",
        "_logprobs",
        "_matcher",
        "_max_tokens",
        "_min_tokens",
        "_seq",
        "_stop_token_ids",
        "_text_length",
        "finish_reason",
        "index",
        "last_token_at",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stopping: Stopping,
        logprobs: LogprobReader | None = None,
        echo: str = "",
    ) -> None:
        """`logprobs`: if they were asked for. `echo`: what the text begins with, whatever stop strings it has."""
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason.ValueType = _UNFINISHED
        # When the newest token came, by `time.monotonic()`; 0 before any has come in this process.
        self.last_token_at = 0.0
        self._detokenizer = detokenizer
        self._echo = echo
        self._logprobs = logprobs
        self._matcher = StopMatcher(stopping.stop) if stopping.stop else None
        self._stop_token_ids = frozenset(stopping.stop_token_ids)
        self._min_tokens = stopping.min_tokens
        self._max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else sys.maxsize
        self._seq = 0
        self._text_length = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason != _UNFINISHED

    @property
    def plain(self) -> bool:
        """Its tokens alone never end it, and come without log-probabilities."""
        return self._matcher is None and not self._stop_token_ids and self._logprobs is None

    @property
    def room(self) -> int:
        """Tokens that it may still get; with the last of them it ends."""
        return self._max_tokens - len(self.token_ids)

    @property
    def _matched(self) -> bool:
        return self._matcher is not None and self._matcher.matched

    def delivered_ids(self) -> bytes:
        """The ids so far, packed: what the next attempt goes on after."""
        return pack_ids(self.token_ids)

    def advance(
        self, token_ids: list[int], finish_reason: FinishReason.ValueType, logprobs: Logprobs | None = None
    ) -> Delta:
        """Takes new tokens, and the worker's finish reason if they are the last ones.

        A stop string ends the choice at the token that completes it, and `max_tokens` where a worker goes on beyond
        it; what follows is dropped. Raises RequestFailed if log-probabilities were asked for and are not those of the
        tokens.
        """
        text = ""
        if len(token_ids) >= (room := self.room):
            if len(token_ids) > room or not finish_reason:
                finish_reason = FinishReason.FINISH_REASON_LENGTH
            token_ids = token_ids[:room]
        if self._matcher is None and not self._stop_token_ids:
            push = self._detokenizer.push
            for token_id in token_ids:
                text += push(token_id)
            self.token_ids += token_ids
        else:
            text, token_ids = self._read_with_stops(token_ids)
        if finish_reason and not self._matched:
            text += self._rest()
        if self._matched:
            finish_reason = FinishReason.FINISH_REASON_STOP
        self.finish_reason = finish_reason
        if not self._seq:
            text = self._echo + text
        delta = Delta(self.index, self._seq, text, self._text_length, token_ids, finish_reason)
        if self._logprobs is not None:
            delta.logprobs = self._logprobs.read(logprobs, token_ids)
        self._seq += 1
        self._text_length += len(text)
        return delta

    def _read_with_stops(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text that can be delivered, and the tokens read for it."""
        text = ""
        read: list[int] = []
        for token_id in token_ids:
            read.append(token_id)
            self.token_ids.append(token_id)
            if token_id in self._stop_token_ids and len(self.token_ids) >= self._min_tokens:
                continue  # it ends the sequence and is, like a stop string, no part of the text
            text += self._match(self._detokenizer.push(token_id))
            if self._matched:
                break
        return text, read

    def _match(self, text: str) -> str:
        if self._matcher is None or len(self.token_ids) < self._min_tokens:
            return text
        return self._matcher.push(text)

    def _rest(self) -> str:
        """What the detokenizer and the stop matcher still hold when no more tokens come."""
        text = self._match(self._detokenizer.flush())
        return text if self._matcher is None or self._matched else text + self._matcher.flush()
