import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.common.redis.answers import AnswerStore, Standing, State
from services.common.redis.client import RedisClient
from services.common.redis.keys import Owner, answer_events, answer_request, gateway_heartbeat, heartbeat_of

MakeStore = Callable[[Owner], AnswerStore]
GATEWAY = Owner("gateway", "gw:1", "a")
OTHER = Owner("gateway", "other", "b")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(redis_url)
    yield client
    await client.close()


@pytest.fixture
def make(redis: RedisClient) -> MakeStore:
    return lambda owner: AnswerStore(redis, owner, ttl_s=60)


async def test_events_are_read_as_they_were_added(make: MakeStore) -> None:
    store = make(GATEWAY)
    assert await store.open("x", b"request", b"print") is None
    assert await store.append("x", 0, [b"a", b"b"], attempt=2) == (Standing.OWNED, 2)
    assert await store.append("x", 2, [b"c"], attempt=2, state=State.DONE) == (Standing.OWNED, 3)
    assert await make(OTHER).read("x", 1) == [b"b", b"c"]
    found = await make(OTHER).find("x")
    assert found is not None
    assert (found.request, found.fingerprint, found.owner) == (b"request", b"print", GATEWAY.consumer)
    assert (found.state, found.attempt) == (State.DONE, 2)


async def test_events_out_of_place_are_not_added(make: MakeStore) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"")
    assert await store.append("x", 1, [b"b"]) == (Standing.OWNED, 0)
    await store.append("x", 0, [b"a"])
    assert await store.append("x", 0, [b"a"]) == (Standing.OWNED, 1), "its answer was lost, and it is sent again"
    assert await store.read("x", 0) == [b"a"]


async def test_an_answer_is_begun_once(make: MakeStore) -> None:
    first, second = make(GATEWAY), make(OTHER)
    assert await first.open("x", b"", b"one") is None
    assert await second.open("x", b"", b"two") == b"one"
    await first.append("x", 0, [b"end"], state=State.DONE)
    assert await second.open("x", b"", b"two") == b"one"


async def test_a_failed_answer_makes_room(make: MakeStore) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"one")
    await store.append("x", 0, [b"error"], state=State.FAILED)
    assert await make(OTHER).open("x", b"", b"two") is None
    assert await store.read("x", 0) == []


async def test_who_reads_what_is_discarded_hears_why(make: MakeStore, redis: RedisClient) -> None:
    store, reader = make(GATEWAY), make(OTHER)
    await store.open("x", b"", b"one")
    waiting = asyncio.create_task(reader.wait("x", 0))
    await store.discard("x", b"refused")
    async with asyncio.timeout(5):
        await waiting
    assert await reader.read("x", 0) == [b"refused"]
    assert await reader.find("x") is None
    assert 0 < await redis.command("PTTL", answer_events("x")) <= 10_000
    assert await reader.open("x", b"", b"two") is None
    assert await reader.read("x", 0) == []


async def test_an_adopted_answer_takes_nothing_from_its_former_owner(make: MakeStore) -> None:
    late, heir = make(GATEWAY), make(OTHER)
    await late.open("x", b"", b"")
    await late.append("x", 0, [b"a"])
    assert await heir.adopt("x", GATEWAY.consumer)
    assert await late.append("x", 1, [b"b"]) == (Standing.LOST, 0)
    assert await heir.append("x", 1, [b"c"]) == (Standing.OWNED, 2)
    assert await heir.read("x", 0) == [b"a", b"c"]
    await late.discard("x", b"refused")
    assert await heir.read("x", 0) == [b"a", b"c"]
    assert await heir.find("x") is not None


async def test_only_one_adopts_and_only_from_the_dead(make: MakeStore, redis: RedisClient) -> None:
    owner, heir = make(GATEWAY), make(OTHER)
    await owner.open("x", b"", b"")
    await redis.command("SET", gateway_heartbeat(GATEWAY.id, GATEWAY.incarnation), "1")
    assert heartbeat_of(GATEWAY.consumer) == gateway_heartbeat(GATEWAY.id, GATEWAY.incarnation)
    assert not await heir.adopt("x", GATEWAY.consumer)
    await redis.command("DEL", heartbeat_of(GATEWAY.consumer))
    third = make(Owner("gateway", "third", "c"))
    assert sorted(await asyncio.gather(heir.adopt("x", GATEWAY.consumer), third.adopt("x", GATEWAY.consumer))) == [
        False,
        True,
    ]


async def test_an_ended_answer_is_not_adopted(make: MakeStore) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"")
    await store.append("x", 0, [b"a"], state=State.DONE)
    assert not await make(OTHER).adopt("x", GATEWAY.consumer)


async def test_a_cancelled_answer_says_so_to_its_owner(make: MakeStore) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"")
    assert await make(OTHER).cancel("x")
    assert await store.append("x", 0, ()) == (Standing.CANCELLED, 0)
    await store.append("x", 0, [b"a"], state=State.FAILED)
    assert not await make(OTHER).cancel("x")
    assert not await make(OTHER).cancel("unknown")


async def test_what_redis_forgot_is_gone(make: MakeStore, redis: RedisClient) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"")
    await redis.command("DEL", answer_request("x"), answer_events("x"))
    assert await store.append("x", 0, [b"a"]) == (Standing.GONE, 0)
    assert await store.find("x") is None


async def test_both_keys_expire(make: MakeStore, redis: RedisClient) -> None:
    store = make(GATEWAY)
    await store.open("x", b"", b"")
    assert await redis.command("PTTL", answer_request("x")) > 0
    await store.append("x", 0, [b"a"])
    assert await redis.command("PTTL", answer_events("x")) > 0


async def test_who_waits_hears_of_the_next_event(make: MakeStore) -> None:
    store, reader = make(GATEWAY), make(OTHER)
    await store.open("x", b"", b"")
    await store.append("x", 0, [b"a"])
    await reader.wait("x", 0)  # it is there already
    waiting = asyncio.create_task(reader.wait("x", 1))
    await store.append("x", 1, [b"b"])
    await waiting
    assert await reader.read("x", 1) == [b"b"]
