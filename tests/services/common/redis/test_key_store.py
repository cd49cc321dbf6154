from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from services.common.api_keys import ApiKey, Limits, digest
from services.common.redis.client import RedisClient
from services.common.redis.key_limits import group_meters, key_meters, scope_of
from services.common.redis.key_store import KeyStore

KEY = ApiKey(
    id="hr-0123456789ab", name="ci", sha256=digest("secret"), money_per_month=Decimal("2.5"), models=("a", "b/c")
)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[KeyStore]:
    client = RedisClient(redis_url)
    yield KeyStore(client)
    await client.close()


async def test_a_key_comes_out_as_it_went_in(store: KeyStore) -> None:
    assert (await store.get(KEY.id), await store.count(), await store.all()) == (None, 0, [])
    await store.put(KEY)
    assert (await store.get(KEY.id), await store.count(), await store.all()) == (KEY, 1, [KEY])
    renamed = KEY.model_copy(update={"name": "other"})
    await store.put(renamed)
    assert await store.all() == [renamed]


async def test_nothing_takes_the_place_of_a_revoked_key(store: KeyStore) -> None:
    assert not await store.replace(KEY), "there is none"
    await store.put(KEY)
    other = KEY.model_copy(update={"sha256": digest("other")})
    assert await store.replace(other) and await store.get(KEY.id) == other
    revoked = other.model_copy(update={"revoked": datetime(2026, 1, 1, tzinfo=UTC)})
    await store.put(revoked)
    assert not await store.replace(KEY)
    assert await store.get(KEY.id) == revoked


async def test_a_group_has_no_limits_until_some_are_set(store: KeyStore) -> None:
    assert await store.group("team") == Limits()
    await store.put_group("team", Limits(concurrent=3))
    assert await store.group("team") == Limits(concurrent=3)


def test_a_key_and_its_group_are_one_scope_with_meters_of_their_own() -> None:
    one, two = KEY.model_copy(update={"group": "g"}), KEY.model_copy(update={"group": "g", "id": "hr-2"})
    assert scope_of(one) == scope_of(two) != scope_of(KEY)
    meters = [*key_meters(one).values(), *key_meters(two).values(), *group_meters(Limits(concurrent=1)).values()]
    assert len({meter.name for meter in meters}) == 3
    assert key_meters(one)["money_per_month"].limit == 2_500_000
