from headrace.v1.machine_time_pb2 import MachineTime, PricedTime
from headrace.v1.worker_pb2 import SequenceTime
from services.gateway.costs.spending import Spending

HOUR_NS = 3600 * 10**9


def told(prefill_hours: int, decode_hours: int, *elsewhere: PricedTime) -> SequenceTime:
    time = MachineTime(prefill_ns=prefill_hours * HOUR_NS, decode_ns=decode_hours * HOUR_NS, saved_prefix_ns=HOUR_NS)
    return SequenceTime(handle=1, time=time, elsewhere=elsewhere)


async def test_attempts_on_several_workers_add_up_at_their_prices() -> None:
    spending = Spending()
    ends: list[int] = []
    for _ in range(3):
        spending.expect()
    spending.receive(told(1, 2, PricedTime(time=MachineTime(prefill_ns=HOUR_NS), price_per_hour=10)), 0.5)
    spending.receive(told(0, 4), 2.0)
    spending.close(lambda: ends.append(spending.costs.nanos))
    assert not ends
    spending.lose()  # its worker died
    assert ends == [(0.5 * 3 + 10 + 2.0 * 4) * 10**9]
    assert spending.costs.saved_prefix_nanos == 2.5 * 10**9
    assert (spending.costs.prefill_ns, spending.costs.decode_ns) == (2 * HOUR_NS, 6 * HOUR_NS)


async def test_what_is_complete_closes_at_once() -> None:
    ends: list[int] = []
    Spending().close(lambda: ends.append(0))
    assert ends == [0]


async def test_what_has_no_price_is_not_waited_for() -> None:
    spending = Spending()
    spending.expect()
    await spending.told()
    assert not spending.priced
