"""What one request tells the schedulers of the workers that it ran on, for the workers' circuit breakers.

A worker's failure is told when the request has ended well on another worker: until then the fault may be the request's
own, which would fail everywhere, and with it blame the whole fleet. Only a probe's failure before its first token is
told at once: its worker gets nothing else until then.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace.v1.scheduler_pb2 import AttemptReport, Placement

Event = AttemptReport.Event


@dataclass(frozen=True, slots=True)
class _Failure:
    report: AttemptReport
    at: float


class Witness:
    """Follows the attempts of one request, one after the other."""

    def __init__(
        self, request_id: str, tell: Callable[[AttemptReport], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._request_id = request_id
        self._tell = tell
        self._clock = clock
        self._placement = Placement()
        self._attempt = 0
        self._untold = False
        """The attempt is a probe of which nothing has been told."""
        self._failures: list[_Failure] = []

    def placed(self, placement: Placement, attempt: int) -> None:
        """An attempt begins on a worker."""
        self._placement, self._attempt = placement, attempt
        self._untold = placement.probe

    def began(self) -> None:
        """The attempt has a token. To be called for each: it is nothing but for the first of a probe."""
        if self._untold:
            self._tell_first(AttemptReport.EVENT_BEGAN)

    def failed(self, *, stalled: bool) -> None:
        """The worker was lost, or its engine failed."""
        event = AttemptReport.EVENT_STALLED if stalled else AttemptReport.EVENT_FAILED
        if self._untold:
            self._tell_first(event)
        else:
            self._failures.append(_Failure(self._report(event), self._clock()))

    def finished(self) -> None:
        """The request has ended well: whoever else failed on it was to blame."""
        for failure in self._failures:
            if failure.report.worker_id != self._placement.worker_id:
                failure.report.age_ms = round((self._clock() - failure.at) * 1000)
                self._tell(failure.report)
        if self._placement.watched:
            self._tell(self._report(AttemptReport.EVENT_FINISHED))

    def withdrawn(self) -> None:
        """The attempt has ended in a way that says nothing of its worker."""
        if self._untold:
            self._tell_first(AttemptReport.EVENT_WITHDRAWN)

    def _tell_first(self, event: Event.ValueType) -> None:
        self._untold = False
        report = self._report(event)
        report.probe = True
        self._tell(report)

    def _report(self, event: Event.ValueType) -> AttemptReport:
        return AttemptReport(
            request_id=self._request_id,
            attempt=self._attempt,
            worker_id=self._placement.worker_id,
            worker_incarnation=self._placement.worker_incarnation,
            event=event,
        )
