"""Refusals by the wait that a new request has to expect, in a simulated queue before a simulated worker."""

import heapq
import random
from dataclasses import dataclass, field

import pytest

from headrace.v1.sampling_pb2 import Priority
from services.common.errors import Overloaded
from services.gateway.shedder import Shedder

MAX_WAIT_S = 30.0
SLOTS, SERVICE_S = 16, 4.0
CAPACITY = SLOTS / SERVICE_S  # requests a second


@dataclass
class Simulated:
    """Callers come at random times; a worker runs so many at once, each for the same time."""

    seed: int = 0
    now: float = 0.0
    waits_s: list[float] = field(default_factory=list)
    finished: int = 0
    refused: int = 0
    retry_after_s: list[int] = field(default_factory=list)
    most_waiting: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.shedder = Shedder(max_wait_s=MAX_WAIT_S, clock=lambda: self.now, draw=self.random.random)
        self.load = self.shedder.of("m")
        self.queue: list[float] = []
        self.ends: list[float] = []

    def run(self, rate: float, seconds: float, priority: Priority.ValueType = Priority.PRIORITY_NORMAL) -> None:
        until, coming = self.now + seconds, self.now
        while (coming := coming + self.random.expovariate(rate)) < until:
            self._work(coming)
            try:
                self.shedder.check("m", priority)
            except Overloaded as error:
                self.refused += 1
                self.retry_after_s.append(error.retry_after_s)
            else:
                self.load.entered()
                self.queue.append(self.now)
                self._place()
                self.most_waiting = max(self.most_waiting, len(self.queue))
        self._work(until)

    def _work(self, until: float) -> None:
        while self.ends and self.ends[0] <= until:
            self.now = heapq.heappop(self.ends)
            self.load.ended(was_placed=True)
            self.finished += 1
            self._place()
        self.now = until

    def _place(self) -> None:
        while self.queue and len(self.ends) < SLOTS:
            self.waits_s.append(self.now - self.queue.pop(0))
            self.load.placed()
            heapq.heappush(self.ends, self.now + SERVICE_S)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("times", [2, 10, 50])
def test_under_overload_the_worker_stays_busy_and_nobody_waits_too_long(times: int, seed: int) -> None:
    queue = Simulated(seed)
    queue.run(times * CAPACITY, 120)
    assert queue.finished >= 0.9 * CAPACITY * 120
    assert max(queue.waits_s) <= 1.2 * MAX_WAIT_S
    assert queue.most_waiting <= 1.2 * MAX_WAIT_S * CAPACITY
    assert queue.refused > 0
    assert all(1 <= seconds <= 60 for seconds in queue.retry_after_s)


def test_nobody_is_refused_below_capacity() -> None:
    queue = Simulated()
    queue.run(0.8 * CAPACITY, 600)
    assert not queue.refused


def test_after_the_overload_all_are_let_in_again() -> None:
    queue = Simulated()
    queue.run(10 * CAPACITY, 60)
    queue.run(0.5 * CAPACITY, 60)
    queue.refused = 0
    queue.run(0.5 * CAPACITY, 60)
    assert not queue.refused


def test_low_priority_is_refused_first_and_high_last() -> None:
    queue = Simulated()
    for _ in range(54):
        queue.load.entered()
    assert 0.8 < queue.load.load < 1.0

    def refusals(priority: Priority.ValueType) -> int:
        refused = 0
        for _ in range(200):
            try:
                queue.shedder.check("m", priority)
            except Overloaded:
                refused += 1
        return refused

    low, normal, high = (refusals(Priority.Value(f"PRIORITY_{name}")) for name in ("LOW", "NORMAL", "HIGH"))
    assert low == 200 > normal > high == 0


def test_a_refusal_says_how_many_wait_and_when_to_come_again() -> None:
    queue = Simulated()
    queue.run(10 * CAPACITY, 60)
    queue.shedder = Shedder(max_wait_s=MAX_WAIT_S, clock=lambda: queue.now, draw=lambda: 0.0)
    load = queue.shedder.of("m")
    for _ in range(64):
        load.entered()
    with pytest.raises(Overloaded, match=r"^64 requests wait for m already; try again in 1 s\.$") as error:
        queue.shedder.check("m", Priority.PRIORITY_NORMAL)
    assert error.value.reason == "overloaded"


def test_the_time_to_a_first_token_counts_while_others_wait() -> None:
    queue = Simulated()
    queue.run(2 * CAPACITY, 10)
    before = queue.load.load
    for _ in range(100):
        queue.load.began(10.0)
    assert (queue.load.load - before) * MAX_WAIT_S == pytest.approx(10.0, abs=0.01)
    idle = Simulated()
    idle.load.began(10.0)
    assert idle.load.load == 0.0, "it is served at once"


def test_models_do_not_share_a_queue() -> None:
    queue = Simulated()
    queue.run(50 * CAPACITY, 60)
    queue.shedder.check("another", Priority.PRIORITY_LOW)
