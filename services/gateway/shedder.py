"""Refuses requests that would wait too long for a worker. Pure: it is told what happens, and asks a clock.

A new request has to expect its first token after a wait of those that wait already, divided by the rate at which
requests end while others wait (Little's law), and the time that a worker lately took to the first token. By the longest
that is allowed that is the load. Requests of normal priority are refused at
random between 0.7 and 1.0 of it, more and more of them, and all above; low priority before them, high after them. So
those who come meet the limit one by one, and not all at the same moment.
"""

import math
from collections import deque
from collections.abc import Callable

from headrace.v1.sampling_pb2 import Priority
from services.common.errors import Overloaded

_WINDOW_S = 30.0
"""The past that the rate is taken from."""
_SHORTEST_S = 2.0
"""Of waiting without a break, before it says anything of the rate."""
_UNMEASURED = 64
"""Requests that may wait, or twice as many as run, before a rate is known."""
_MOST_RETRY_S = 60
_NEWEST = 0.1
"""What the newest time to a first token counts in their moving average."""
# Load at which the first is refused, and from which on all are.
_LIMITS = {
    Priority.PRIORITY_LOW: (0.5, 0.8),
    Priority.PRIORITY_NORMAL: (0.7, 1.0),
    Priority.PRIORITY_HIGH: (1.0, 1.3),
}


class ModelLoad:
    """The requests of one model: how many wait and run, and how fast they end."""

    def __init__(self, max_wait_s: float, clock: Callable[[], float]) -> None:
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waiting_since = 0.0
        self._ends: deque[float] = deque()
        self._rate: float | None = None
        self._first_token_s = 0.0
        self.waiting = self.running = 0

    def entered(self) -> None:
        if not self.waiting:
            self._waiting_since = self._clock()
            self._ends.clear()
        self.waiting += 1

    def placed(self) -> None:
        self.waiting -= 1
        self.running += 1

    def began(self, seconds: float) -> None:
        """A request's first token came so long after it was placed."""
        self._first_token_s += _NEWEST * (seconds - self._first_token_s)

    def ended(self, *, was_placed: bool) -> None:
        if was_placed:
            self.running -= 1
            self._ends.append(self._clock())
        else:
            self.waiting -= 1

    @property
    def load(self) -> float:
        """1: a new request would wait for as long as is allowed."""
        wait_s = self.expected_wait_s()
        if wait_s is None:
            return self.waiting / max(_UNMEASURED, 2 * self.running)
        return wait_s / self._max_wait_s

    def expected_wait_s(self) -> float | None:
        """For a new request's first token; None while nothing is known, and 0 while nobody waits."""
        rate = self._measured_rate()
        if rate is None:
            return None
        return self.waiting / rate + self._first_token_s if self.waiting else 0.0

    def _measured_rate(self) -> float | None:
        """Requests that end in a second, while others wait: now, or else when some did last."""
        now = self._clock()
        span = min(now - self._waiting_since, _WINDOW_S) if self.waiting else 0.0
        if span >= _SHORTEST_S:
            while self._ends and self._ends[0] < now - span:
                self._ends.popleft()
            if self._ends:
                self._rate = len(self._ends) / span
        return self._rate


class Shedder:
    """The loads of all models."""

    def __init__(self, *, max_wait_s: float, clock: Callable[[], float], draw: Callable[[], float]) -> None:
        """`draw`: a random number from 0 to 1, without 1."""
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._draw = draw
        self._loads: dict[str, ModelLoad] = {}

    def of(self, model: str) -> ModelLoad:
        if model not in self._loads:
            self._loads[model] = ModelLoad(self._max_wait_s, self._clock)
        return self._loads[model]

    def check(self, model: str, priority: Priority.ValueType) -> None:
        """Raises Overloaded if a new request is to be refused now."""
        load = self.of(model)
        first, last = _LIMITS.get(priority, _LIMITS[Priority.PRIORITY_NORMAL])
        if load.load < first or self._draw() >= (load.load - first) / (last - first):
            return
        wait_s = load.expected_wait_s()
        excess_s = 1.0 if wait_s is None else wait_s - first * self._max_wait_s
        retry_after_s = min(max(1, math.ceil(excess_s)), _MOST_RETRY_S)
        about = "" if wait_s is None else f": a new one would wait about {wait_s:.0f} s"
        raise Overloaded(
            f"{load.waiting} requests wait for {model} already{about}; try again in {retry_after_s} s.",
            reason="overloaded",
            retry_after_s=retry_after_s,
        )
