from datetime import date

import pytest

from services.common.machine_costs import MachineCosts
from services.common.redis.client import RedisClient
from services.common.redis.costs import CostKey, CostStore
from toolkit.costs import NO_KEY, BadSince, as_json, first_day, per_thousand_tokens, read_costs, total

TODAY = date(2100, 3, 2)
YESTERDAY = date(2100, 3, 1)


def costs(nanos: int) -> MachineCosts:
    return MachineCosts(requests=1, prompt_tokens=30, completion_tokens=10, decode_nanos=nanos)


async def test_rows_add_up_by_key_by_model_and_by_day(redis_url: str) -> None:
    redis = RedisClient(redis_url)
    store = CostStore(redis)
    await store.add(
        YESTERDAY, {CostKey("a", "m"): costs(1), CostKey("", "m"): costs(2)}, writer="w", batch=1, keep_days=9
    )
    await store.add(TODAY, {CostKey("a", "other"): costs(4)}, writer="w", batch=2, keep_days=9)

    async def sums(by: str, first: date) -> dict[str, int]:
        rows = await read_costs(store, by, first, TODAY)  # type: ignore[arg-type]
        return {name: row.nanos for name, row in rows.items()}

    assert await sums("key", YESTERDAY) == {NO_KEY: 2, "a": 5}
    assert await sums("model", YESTERDAY) == {"m": 3, "other": 4}
    assert await sums("day", YESTERDAY) == {"2100-03-01": 3, "2100-03-02": 4}
    assert await sums("day", TODAY) == {"2100-03-02": 4}
    assert total(await read_costs(store, "key", YESTERDAY, TODAY)).requests == 3
    await redis.close()


def test_money_per_thousand_tokens() -> None:
    assert per_thousand_tokens(MachineCosts()) == 0
    assert per_thousand_tokens(costs(2 * 10**9)) == 50.0
    told = as_json(costs(2 * 10**9))
    assert (told["cost"], told["cost_per_1000_tokens"], told["decode_nanos"]) == (2.0, 50.0, 2 * 10**9)


def test_since_is_a_number_of_days_or_a_day() -> None:
    assert first_day("1d", TODAY) == TODAY
    assert first_day("2d", TODAY) == YESTERDAY
    assert first_day("2100-02-28", TODAY) == date(2100, 2, 28)
    for bad in ("0d", "yesterday", "2100-03-03", "99999d", "1800-01-01"):
        with pytest.raises(BadSince, match="--since"):
            first_day(bad, TODAY)
