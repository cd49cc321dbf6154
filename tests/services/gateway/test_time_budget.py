"""Whatever happens, and whatever others report, the parts are disjoint and add up to the whole."""

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.time_budget import PHASES, RunTimes, TimeBudget

INSTANTS = st.integers(0, 10_000)
DURATIONS = st.integers(-100, 20_000)
RUNS = st.builds(
    RunTimes,
    begun_at=st.none() | INSTANTS,
    ended_at=st.none() | INSTANTS,
    fetch=DURATIONS,
    queue=DURATIONS,
    prefill=DURATIONS,
    decode=st.none() | DURATIONS,
)
CALLS = st.one_of(
    st.tuples(st.just("spend"), st.sampled_from(PHASES), INSTANTS),
    st.tuples(st.just("spend_away"), st.lists(st.tuples(st.sampled_from(PHASES), DURATIONS), max_size=4), INSTANTS),
    st.tuples(st.just("spend_run"), RUNS, INSTANTS),
)


@given(began=INSTANTS, calls=st.lists(CALLS, max_size=12))
def test_parts_add_up_and_are_never_negative(began: int, calls: list[tuple[str, object, int]]) -> None:
    budget = TimeBudget(began)
    for name, what, until in calls:
        getattr(budget, name)(what, until)
    assert sum(budget.parts.values()) == budget.total >= 0
    assert min(budget.parts.values()) >= 0
    assert began + budget.total >= max([began, *(until for _, _, until in calls)]), "all the time is accounted for"


def parts(budget: TimeBudget) -> dict[str, int]:
    return {phase: spent for phase, spent in budget.parts.items() if spent}


def test_what_others_measured_is_laid_into_the_time_it_took_here() -> None:
    budget = TimeBudget(1_000)
    budget.spend("gateway", 1_100)
    budget.spend("admission", 1_300)
    budget.spend_away((("placement", 50), ("queue", 400)), 1_800)
    budget.spend("placement", 1_850)
    budget.spend_run(RunTimes(begun_at=2_500, ended_at=9_600, fetch=100, queue=20, prefill=500, decode=7_000), 9_700)
    budget.spend("detokenize", 9_800)
    assert budget.total == 8_800
    assert parts(budget) == {
        "gateway": 100 + 100,
        "admission": 200,
        "placement": 50 + 50,
        "queue": 400 + 20,
        "fetch": 100,
        "prefill": 500,
        "decode": 7_000,
        "detokenize": 100,
        "network": 50 + 30 + 100,
    }


def test_durations_longer_than_the_time_are_cut_from_the_end() -> None:
    budget = TimeBudget(0)
    budget.spend_away((("placement", 50), ("queue", 400)), 300)
    assert parts(budget) == {"placement": 50, "queue": 250}


def test_a_run_without_a_word_of_its_worker_was_doing_what_came_next() -> None:
    budget = TimeBudget(0)
    budget.spend_run(RunTimes(ended_at=100), 110)
    budget.spend_run(RunTimes(begun_at=200, prefill=80), 300)
    assert parts(budget) == {"prefill": 100 + 80, "gateway": 10, "network": 10, "decode": 100}
