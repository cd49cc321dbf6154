"""A worker's circuit breaker: whether its failures keep work from it. Pure.

    closed      it gets work; failures in a row open it, and so does one stall
    open        it gets nothing until its backoff ends
    half-open   the next placement is its probe, one at a time: a first token closes the breaker; a failure, or silence,
                opens it again, for twice as long up to a longest backoff. Silence adds up over probes whose callers
                gave up waiting: a hung worker does not get caller after caller

Failures in a row, and not their share in a window: a worker that ends some of what it gets well is worth having, since
what fails goes on elsewhere; and what ends well need be told only of a worker under suspicion. What fails at the same
moment is one failure: a broken stream, or a failed step, takes everything along that ran there.

A stall opens at once: it was watched for long before it was called one, and the next would cost callers as long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ProbeKey = tuple[str, int]
"""Request id and attempt."""
State = Literal["closed", "open", "half_open"]

_MOST_DOUBLINGS = 30


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """`failures` in a row open it. Seconds: those less than `together_s` apart are one failure; probes without a word
    for `probe_timeout_s` have failed.
    """

    failures: int = 3
    first_backoff_s: float = 1.0
    longest_backoff_s: float = 30.0
    probe_timeout_s: float = 30.0
    together_s: float = 1.0


class Breaker:
    """The breaker of one incarnation of a worker."""

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        # When it failed since an attempt ended well; unless it is closed, as often as opens it.
        self._failures: list[float] = []
        self._forgiven_until = -math.inf
        self._openings = 0  # since an attempt ended well
        self._open_until: float | None = None  # None: closed
        self._probe: ProbeKey | None = None
        self._probe_until = math.inf
        self._silence_left_s = policy.probe_timeout_s

    @property
    def state(self) -> State:
        now = self._clock()
        if self._probe is not None and now >= self._probe_until:
            self._open()
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    @property
    def takes_work(self) -> bool:
        """Whether a placement may be made now; if it is not closed, as its probe."""
        state = self.state
        return state == "closed" or (state == "half_open" and self._probe is None)

    @property
    def suspected(self) -> bool:
        """Whether it matters that an attempt ends well."""
        return bool(self._failures or self._openings)

    @property
    def changes_at(self) -> float:
        """When time alone changes the state, or what may be placed."""
        if self.state == "open":
            assert self._open_until is not None, "an open breaker has a backoff"
            return self._open_until
        return self._probe_until

    # --- what is told of ordinary attempts

    def failed(self, at: float) -> None:
        """An attempt failed then. Told late, it may be old news."""
        if self._is_news(at):
            self._failures.append(at)
            if len(self._failures) >= self._policy.failures:
                self._open()

    def stalled(self, at: float) -> None:
        """The worker stood still, or said nothing, until then."""
        if self._is_news(at):
            self._failures = [at] * self._policy.failures
            self._open()

    def finished(self) -> None:
        """An attempt that was made under suspicion has ended well."""
        if self.state == "closed":
            self._failures.clear()
            self._openings = 0
            self._forgiven_until = self._clock()

    # --- probes

    def begin_probe(self, key: ProbeKey) -> None:
        """The placement that is made now is the probe."""
        assert self.takes_work and self.state == "half_open", "one probe at a time, after the backoff"
        self._probe, self._probe_until = key, self._clock() + self._silence_left_s

    def probe_began(self) -> None:
        """A probe has its first token, be it another scheduler's. The next failure opens the breaker again."""
        if self.state != "closed":
            self._open_until = None
            self._end_probes()
            del self._failures[0]
            self._forgiven_until = self._clock()

    def probe_failed(self, key: ProbeKey) -> None:
        """A probe has failed. While this breaker's own is on its way, no other's failure counts."""
        if self.state == "half_open" and self._probe in (None, key):
            self._open()

    def withdraw_probe(self, key: ProbeKey) -> None:
        """This probe, if it is the one, will say nothing of the worker."""
        if self._probe == key and self.state == "half_open":
            self._silence_left_s = self._probe_until - self._clock()
            self._probe, self._probe_until = None, math.inf

    def _is_news(self, at: float) -> bool:
        apart = all(abs(at - failure) >= self._policy.together_s for failure in self._failures)
        return self.state == "closed" and at > self._forgiven_until and apart

    def _open(self) -> None:
        backoff_s = self._policy.first_backoff_s * 2.0 ** min(self._openings, _MOST_DOUBLINGS)
        self._open_until = self._clock() + min(backoff_s, self._policy.longest_backoff_s)
        self._openings += 1
        self._end_probes()

    def _end_probes(self) -> None:
        self._probe, self._probe_until = None, math.inf
        self._silence_left_s = self._policy.probe_timeout_s
