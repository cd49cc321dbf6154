import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.breaker import Breaker, BreakerPolicy

POLICY = BreakerPolicy(failures=3, first_backoff_s=2.0, longest_backoff_s=10.0, probe_timeout_s=20.0, together_s=1.0)
PROBE = ("r", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(POLICY, clock)


def fail(breaker: Breaker, clock: Clock, times: int = 1) -> None:
    for _ in range(times):
        clock.now += 1.5
        breaker.failed(clock.now)


def wait(breaker: Breaker, clock: Clock) -> float:
    """Lets the backoff end; returns how long it took."""
    assert breaker.state == "open" and not breaker.takes_work
    seconds = breaker.changes_at - clock.now
    clock.now = breaker.changes_at
    assert breaker.state == "half_open" and breaker.takes_work
    return seconds


def test_failures_in_a_row_open_it(breaker: Breaker, clock: Clock) -> None:
    assert (breaker.state, breaker.takes_work, breaker.suspected) == ("closed", True, False)
    fail(breaker, clock, 2)
    assert (breaker.state, breaker.takes_work, breaker.suspected) == ("closed", True, True)
    breaker.finished()
    assert not breaker.suspected
    fail(breaker, clock, 2)
    assert breaker.state == "closed"
    fail(breaker, clock)
    assert (breaker.state, breaker.takes_work) == ("open", False)


def test_what_fails_together_is_one_failure(breaker: Breaker, clock: Clock) -> None:
    for at in (50.0, 50.2, 49.9, 50.9, 60.0, 50.5, 60.9):
        breaker.failed(at)
    assert breaker.state == "closed"
    breaker.failed(55.0)
    assert breaker.state == "open"


def test_a_stall_opens_it_at_once(breaker: Breaker, clock: Clock) -> None:
    breaker.stalled(clock.now)
    assert breaker.state == "open"


def test_a_failure_told_after_something_ended_well_is_old_news(breaker: Breaker, clock: Clock) -> None:
    breaker.finished()
    breaker.stalled(clock.now)
    breaker.failed(clock.now - 5)
    assert (breaker.state, breaker.suspected) == ("closed", False)
    clock.now += 5
    breaker.stalled(clock.now)
    wait(breaker, clock)
    breaker.begin_probe(PROBE)
    breaker.probe_began()
    breaker.stalled(clock.now - 1)
    assert breaker.state == "closed"


def test_a_backoff_doubles_up_to_the_longest(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    backoffs = []
    for _ in range(5):
        backoffs.append(wait(breaker, clock))
        breaker.begin_probe(PROBE)
        breaker.probe_failed(PROBE)
    assert backoffs == [2, 4, 8, 10, 10]


def test_a_probe_that_begins_closes_it_and_the_next_failure_opens_it_for_longer(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    assert wait(breaker, clock) == 2
    breaker.begin_probe(PROBE)
    assert (breaker.state, breaker.takes_work) == ("half_open", False), "one at a time"
    breaker.probe_began()
    assert (breaker.state, breaker.takes_work, breaker.suspected) == ("closed", True, True)
    fail(breaker, clock)
    assert wait(breaker, clock) == 4
    breaker.begin_probe(PROBE)
    breaker.probe_began()
    breaker.finished()
    fail(breaker, clock, 2)
    assert breaker.state == "closed"
    fail(breaker, clock)
    assert wait(breaker, clock) == 2, "it begins anew"


def test_a_probe_without_a_word_has_failed_and_may_still_succeed_later(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    wait(breaker, clock)
    breaker.begin_probe(PROBE)
    assert breaker.changes_at == clock.now + 20
    clock.now += 20
    assert wait(breaker, clock) == 4
    breaker.begin_probe(("s", 1))
    breaker.withdraw_probe(PROBE)
    assert not breaker.takes_work, "it is another's"
    breaker.probe_began()
    assert breaker.state == "closed"


def test_a_withdrawn_probe_leaves_its_place_to_the_next(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    wait(breaker, clock)
    breaker.begin_probe(PROBE)
    breaker.withdraw_probe(PROBE)
    assert (breaker.state, breaker.takes_work, breaker.changes_at) == ("half_open", True, math.inf)


def test_silence_adds_up_over_probes_whose_callers_left(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    wait(breaker, clock)
    for number in range(2):
        breaker.begin_probe((f"r{number}", 1))
        clock.now += 8
        breaker.withdraw_probe((f"r{number}", 1))
        assert breaker.takes_work
    breaker.begin_probe(PROBE)
    assert breaker.changes_at == clock.now + 20 - 16
    clock.now += 4
    breaker.withdraw_probe(PROBE)
    assert wait(breaker, clock) == 4
    breaker.begin_probe(PROBE)
    assert breaker.changes_at == clock.now + 20


def test_what_was_running_when_it_opened_says_no_more(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    breaker.finished()
    until = breaker.changes_at
    fail(breaker, clock)
    breaker.probe_failed(PROBE)
    assert (breaker.state, breaker.changes_at) == ("open", until)


def test_the_probes_of_another_scheduler_count_while_there_is_none_here(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, clock, 3)
    wait(breaker, clock)
    breaker.probe_failed(("theirs", 1))
    assert wait(breaker, clock) == 4
    breaker.begin_probe(PROBE)
    breaker.probe_failed(("theirs", 2))
    assert breaker.state == "half_open"
    breaker.probe_began()
    breaker.probe_failed(PROBE)
    breaker.probe_began()
    assert breaker.state == "closed"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["fail", "stall", "finish", "place", "probe began", "probe failed", "withdraw", "wait"]),
            st.floats(0, 15),
        ),
        max_size=60,
    )
)
def test_invariants(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    breaker = Breaker(POLICY, clock)
    probe: tuple[tuple[str, int], float] | None = None  # its key and its end
    in_a_row = 0
    for number, (step, seconds) in enumerate(steps):
        before = breaker.state
        key = probe[0] if probe else ("none", 0)
        match step:
            case "fail":
                breaker.failed(clock.now - seconds)
                in_a_row += 1
            case "stall":
                breaker.stalled(clock.now - seconds)
                in_a_row += POLICY.failures
            case "finish":
                breaker.finished()
                in_a_row = 0 if before == "closed" else in_a_row
            case "place" if breaker.takes_work and before == "half_open":
                assert probe is None or clock.now >= probe[1], "one probe at a time"
                breaker.begin_probe((f"r{number}", 1))
                probe = (f"r{number}", 1), breaker.changes_at
                assert clock.now <= probe[1] <= clock.now + POLICY.probe_timeout_s
            case "probe began":
                breaker.probe_began()
                assert breaker.state == "closed"
                probe = None
                in_a_row = in_a_row if before == "closed" else POLICY.failures - 1
            case "probe failed" if probe:
                breaker.probe_failed(key)
                probe = None
            case "withdraw" if probe:
                breaker.withdraw_probe(key)
                probe = None
            case "wait":
                clock.now += seconds
        if before == "closed" and breaker.state != "closed":
            assert breaker.state == "open" and in_a_row >= POLICY.failures
        if before == "open":
            assert breaker.state != "closed" or step == "probe began", "only a probe closes it"
        if breaker.state == "open":
            assert not breaker.takes_work
            assert clock.now < breaker.changes_at <= clock.now + POLICY.longest_backoff_s
        assert breaker.suspected or breaker.state == "closed"
    for _ in range(2):  # a probe that never answers, then a backoff
        if not breaker.takes_work:
            clock.now = breaker.changes_at
    assert breaker.takes_work, "it never stays shut"
