import pytest

from services.worker.engine.batching_policy import ContinuousBatching, StaticBatching
from services.worker.engine.sequence import Sequence
from tests.fakes import make_sequence


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def some(count: int) -> list[Sequence]:
    return [make_sequence(key, [1]) for key in range(count)]


def admitted(policy: StaticBatching, waiting: list[Sequence], running: list[Sequence]) -> list[Sequence]:
    policy.update(waiting, running)
    return [sequence for sequence in waiting if policy.admits(sequence)]


def test_continuous_admits_everyone() -> None:
    policy = ContinuousBatching()
    waiting = some(2)
    policy.update(waiting, [])
    assert all(policy.admits(sequence) for sequence in waiting)


def test_static_needs_a_size() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        StaticBatching(0, 1.0, Clock())


def test_static_starts_when_full() -> None:
    policy = StaticBatching(2, 10.0, Clock())
    a, b, c = some(3)
    assert admitted(policy, [a], []) == []
    assert admitted(policy, [a, b, c], []) == [a, b]


def test_static_starts_with_fewer_after_the_timeout() -> None:
    clock = Clock()
    policy = StaticBatching(2, 10.0, clock)
    [a] = some(1)
    assert admitted(policy, [a], []) == []
    clock.now_s += 9.9
    assert admitted(policy, [a], []) == []
    clock.now_s += 0.2
    assert admitted(policy, [a], []) == [a]


def test_static_lets_nobody_join_until_all_are_done() -> None:
    clock = Clock()
    policy = StaticBatching(2, 10.0, clock)
    a, b, c, d = some(4)
    assert admitted(policy, [a, b, c], []) == [a, b]
    clock.now_s += 100
    assert admitted(policy, [c, d], [a, b]) == []
    assert admitted(policy, [c, d], [b]) == []
    assert admitted(policy, [b, c, d], []) == [b]  # preempted, and still a member
    assert admitted(policy, [c, d], []) == [c, d]


def test_static_counts_the_wait_during_the_batch_before() -> None:
    clock = Clock()
    policy = StaticBatching(2, 10.0, clock)
    a, b, c = some(3)
    admitted(policy, [a, b], [])
    admitted(policy, [c], [a, b])
    clock.now_s += 11
    assert admitted(policy, [c], []) == [c]


def test_static_timeout_begins_anew_when_the_queue_was_empty() -> None:
    clock = Clock()
    policy = StaticBatching(2, 10.0, clock)
    a, b = some(2)
    admitted(policy, [a], [])
    admitted(policy, [], [])  # a was cancelled
    clock.now_s += 11
    assert admitted(policy, [b], []) == []
