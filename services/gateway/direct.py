"""The short way of a token: from a step's message to the caller at once, past the request's task.

To wake a task for each token, only to have it look what has come, takes longer than all that is done with the token.
So once a choice has begun, and while its request's task has nothing else to see to, the tokens of a step go to their
callers one after the other as the message is read. What is anything but a token in the middle wakes the task.
"""

import logging
from typing import Protocol

from headrace.v1.sampling_pb2 import FinishReason
from services.common.errors import RequestFailed
from services.gateway.active_request import ActiveRequest
from services.gateway.metrics import ModelMetrics
from services.gateway.request import Delta
from services.gateway.text.choice import Choice

log = logging.getLogger(__name__)

_UNFINISHED = FinishReason.FINISH_REASON_UNSPECIFIED


class Outlet(Protocol):
    """Where the deltas of one answer go at once, if nothing holds them up."""

    @property
    def open(self) -> bool:
        """A delta can be written now, and all that came before it are."""

    def write(self, delta: Delta) -> None:
        """Takes a delta, while it is open."""


class StepTally:
    """The tokens of one step, counted together where they are alike."""

    def __init__(self, now: float) -> None:
        """`now`: when the step's message came, by `time.monotonic()`."""
        self.now = now
        self._counts: dict[tuple[ModelMetrics, float], int] = {}

    def add(self, metrics: ModelMetrics, gap_s: float, tokens: int) -> None:
        """Tokens of one choice, so many seconds after the one before each."""
        kind = (metrics, gap_s)
        self._counts[kind] = self._counts.get(kind, 0) + tokens

    def close(self) -> None:
        """Hands the counts on."""
        for (metrics, gap_s), tokens in self._counts.items():
            metrics.tokens.inc(tokens)
            metrics.inter_token_latency.observe(gap_s, tokens)


class DirectDelivery:
    """Delivers the tokens of one choice that has begun, cannot end by what its tokens say, and is not recorded."""

    __slots__ = ("_active", "_choice", "_metrics", "_outlet")

    def __init__(self, active: ActiveRequest, choice: Choice, outlet: Outlet, metrics: ModelMetrics) -> None:
        self._active = active
        self._choice = choice
        self._outlet = outlet
        self._metrics = metrics

    def deliver(self, token_ids: list[int], tally: StepTally) -> bool:
        """Tokens in the middle of the sequence, one at least. False: its task has to see to them."""
        if not (self._active.waiting and self._outlet.open and len(token_ids) < self._choice.room):
            return False
        try:
            self._deliver(token_ids, tally)
        except Exception:  # a fault of this request, which is not to end its neighbors' on the same stream
            log.exception("request %s: its tokens could not be delivered", self._active.id)
            self._active.fail(RequestFailed("The server failed while it delivered this answer; its log says why."))
        return True

    def _deliver(self, token_ids: list[int], tally: StepTally) -> None:
        choice = self._choice
        delta = choice.advance(token_ids, _UNFINISHED)
        tally.add(self._metrics, (tally.now - choice.last_token_at) / len(token_ids), len(token_ids))
        choice.last_token_at = tally.now
        self._outlet.write(delta)
