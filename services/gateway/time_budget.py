"""Where a request's wall time went: parts that follow one another without a gap, so that they add up to the whole.

Pure; knows no clock but the instants it is given, in microseconds of this process's monotonic clock (`now_us`). What
happens in other processes comes as durations, so that clocks of two machines need not agree. They are laid into the
interval in which they happened here, and what they leave of it is `network`.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal[
    "gateway", "admission", "queue", "placement", "fetch", "prefill", "decode", "detokenize", "network"
]  # fmt: skip
"""docs/observability.md says what each is."""

PHASES: tuple[Phase, ...] = get_args(Phase)


def now_us() -> int:
    return time.monotonic_ns() // 1000


@dataclass(slots=True)
class RunTimes:
    """What is known of one sequence's time on its worker, in microseconds."""

    # When its first token and its end were received; None: they were not.
    begun_at: int | None = None
    ended_at: int | None = None
    # As the worker measured them. `fetch`, `queue` and `prefill` come before the first token, `decode` after it.
    fetch: int = 0
    queue: int = 0
    prefill: int = 0
    decode: int | None = None


class TimeBudget:
    """The time of one request so far. Every call accounts for what has passed since the call before."""

    __slots__ = ("_began", "_parts", "_until", "intervals")

    def __init__(self, began: int) -> None:
        self._began = self._until = began
        self._parts: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        # What was spent in this process, in order: (phase, from, until).
        self.intervals: list[tuple[Phase, int, int]] = []

    @property
    def parts(self) -> dict[Phase, int]:
        """Microseconds of each phase."""
        return self._parts

    @property
    def total(self) -> int:
        """Microseconds from the beginning to the newest call: the sum of the parts."""
        return self._until - self._began

    def spend(self, phase: Phase, until: int) -> None:
        """All of it was this phase. An instant that is accounted for already changes nothing."""
        if until > self._until:
            self.intervals.append((phase, self._until, until))
            self._add(phase, until)

    def spend_away(self, durations: Iterable[tuple[Phase, int]], until: int) -> None:
        """It was spent in other processes, which measured these durations; the rest is `network`.

        Durations that are longer than there was time are cut, the last ones first.
        """
        for phase, duration in durations:
            self._add(phase, min(until, self._until + duration))
        self._add("network", until)

    def spend_run(self, run: RunTimes, until: int) -> None:
        """A sequence ran on a worker. A part that its worker did not report is what it was doing in that time."""
        ended_at = until if run.ended_at is None else run.ended_at
        if run.begun_at is None:
            self.spend("prefill", ended_at)
        else:
            self.spend_away((("fetch", run.fetch), ("queue", run.queue), ("prefill", run.prefill)), run.begun_at)
            if run.decode is None:
                self.spend("decode", ended_at)
            else:
                self.spend_away((("decode", run.decode),), ended_at)
        self.spend("gateway", until)

    def _add(self, phase: Phase, until: int) -> None:
        if until > self._until:
            self._parts[phase] += until - self._until
            self._until = until
