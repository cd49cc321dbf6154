from collections.abc import AsyncIterator
from datetime import date

import pytest

from services.common.machine_costs import MachineCosts
from services.common.redis.client import RedisClient
from services.common.redis.costs import CostKey, CostStore
from services.common.redis.keys import costs_of_day
from tests.redis_server import RedisServer

DAY = date(2100, 1, 2)
NAMED, NOBODY = CostKey("my key/é", "org/model:1 B"), CostKey("", "org/model:1 B")


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis_server.url)
    await client.command("FLUSHALL")
    yield client
    await client.close()


def costs(amount: int) -> MachineCosts:
    return MachineCosts(requests=1, completion_tokens=amount, decode_ns=amount * 2**53, decode_nanos=amount)


async def test_sums_are_exact_and_apart_by_key_model_and_day(redis: RedisClient) -> None:
    store = CostStore(redis)
    await store.add(DAY, {NAMED: costs(3), NOBODY: costs(5)}, writer="one", batch=1, keep_days=2)
    await store.add(DAY, {NAMED: costs(4)}, writer="other", batch=1, keep_days=2)
    assert await store.of_day(DAY) == {
        NAMED: MachineCosts(requests=2, completion_tokens=7, decode_ns=7 * 2**53, decode_nanos=7),
        NOBODY: costs(5),
    }
    assert await store.of_day(date(2100, 1, 3)) == {}


async def test_a_batch_that_is_sent_again_counts_once(redis: RedisClient) -> None:
    store = CostStore(redis)
    for _ in range(3):
        await store.add(DAY, {NAMED: costs(3)}, writer="one", batch=7, keep_days=2)
    await store.add(DAY, {NAMED: costs(1)}, writer="one", batch=8, keep_days=2)
    assert (await store.of_day(DAY))[NAMED] == MachineCosts(
        requests=2, completion_tokens=4, decode_ns=4 * 2**53, decode_nanos=4
    )


async def test_a_day_is_forgotten_in_time(redis: RedisClient) -> None:
    await CostStore(redis).add(DAY, {NAMED: costs(3)}, writer="one", batch=1, keep_days=2)
    ttl_s, now_s = await redis.command("TTL", costs_of_day(DAY)), (await redis.command("TIME"))[0]
    midnight_s = 4102531200 + 2 * 86_400  # of the day, and two more
    assert abs(int(now_s) + ttl_s - midnight_s) <= 1
