from hypothesis import given
from hypothesis import strategies as st

from services.common.machine_costs import NANOS, MachineCosts, price_of

TIMES = st.tuples(st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 10**12))


def test_an_hour_costs_the_price() -> None:
    assert price_of(3600 * NANOS, 2.5) == 2.5 * NANOS
    assert price_of(36 * NANOS, 2.5) == 0.025 * NANOS
    assert price_of(10**6, 0.0) == 0


@given(st.lists(TIMES, max_size=20), st.floats(0, 1000))
def test_what_is_spent_adds_up_in_any_order(times: list[tuple[int, int, int]], price: float) -> None:
    one, other, whole = MachineCosts(), MachineCosts(), MachineCosts()
    for position, (prefill_ns, decode_ns, saved_ns) in enumerate(times):
        for costs in ((one, other)[position % 2], whole):
            costs.spend(prefill_ns, decode_ns, price, saved_ns)
    one.add(other)
    assert one == whole
    assert one.nanos == one.prefill_nanos + one.decode_nanos
    assert abs(one.nanos - price * sum(sum(time[:2]) for time in times) / 3600) <= len(times) + 1e-6 * one.nanos
