"""Meters on a real Redis: what they count, when leases run out, and many callers at once."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis as redis_library

from services.common.redis.client import RedisClient
from services.common.redis.keys import StreamEntry, limit_keys
from services.common.redis.limits import Charge, Claim, LimitStore, Meter
from tests.redis_server import RedisServer
from tests.services.common.redis.limits_bench import MINUTE, SCOPE, Bench

TOKENS = Meter("tokens", 100, MINUTE)
REQUESTS = Meter("requests", 3, MINUTE)
CONCURRENT = Meter("concurrent", 2, 0)


@pytest.fixture
async def bench(redis_url: str, own_clock: None) -> AsyncIterator[Bench]:
    bench = Bench(redis_url)
    await bench.at(1_000_000_000)
    yield bench
    await bench.client.close()


async def test_a_reservation_holds_and_the_end_gives_back_what_was_not_used(bench: Bench) -> None:
    assert await bench.reserve("a", Claim(TOKENS, hold=60))
    assert await bench.sums(TOKENS) == (0, 60)
    assert not await bench.reserve("b", Claim(TOKENS, hold=41))
    await bench.charge("a", Claim(TOKENS, hold=60), 25)
    assert await bench.sums(TOKENS) == (25, 0)
    assert await bench.reserve("b", Claim(TOKENS, hold=75))


async def test_all_meters_or_none(bench: Bench) -> None:
    assert not await bench.reserve("a", Claim(REQUESTS, count=1), Claim(TOKENS, hold=101))
    assert await bench.sums(REQUESTS) == (0, 0)
    assert await bench.reserve("a", Claim(REQUESTS, count=1), Claim(TOKENS, hold=100))
    assert await bench.sums(REQUESTS) == (1, 0)


async def test_concurrent_is_what_is_held(bench: Bench) -> None:
    claim = Claim(CONCURRENT, hold=1)
    assert await bench.reserve("a", claim) and await bench.reserve("b", claim)
    assert not await bench.reserve("c", claim)
    assert bench.standings[0].fits_in_ms is None
    await bench.charge("a", claim, 0)
    assert await bench.reserve("c", claim)
    assert await bench.sums(CONCURRENT) == (0, 2)


async def test_a_window_slides_and_says_when_there_is_room(bench: Bench) -> None:
    begin = 1_000_000_000
    for number, second in enumerate((0, 10, 20)):
        await bench.at(begin + second * 1000)
        assert await bench.reserve(f"r{number}", Claim(REQUESTS, count=1))
    assert not await bench.reserve("x", Claim(REQUESTS, count=1))
    (standing,) = bench.standings
    assert standing.unused_in_ms == 60_500
    assert standing.fits_in_ms == 40_500
    await bench.at(begin + 60_499)
    assert not await bench.reserve("x", Claim(REQUESTS, count=1))
    await bench.at(begin + 60_500)
    assert await bench.reserve("x", Claim(REQUESTS, count=1))


async def test_tokens_count_from_when_they_were_produced(bench: Bench) -> None:
    begin, claim = 1_000_000_000, Claim(TOKENS, hold=100)
    await bench.reserve("long", claim)
    await bench.charge("long", claim, 30, ended=False)
    for second in (10, 20, 30, 40, 50):
        await bench.at(begin + second * 1000)
        await bench.charge("long", claim, 30, ended=False)
    await bench.at(begin + 61_000)
    await bench.charge("long", claim, 30, ended=False)
    assert await bench.sums(TOKENS) == (0, 70)
    await bench.charge("long", claim, 90)
    assert await bench.sums(TOKENS) == (60, 0)


async def test_an_expired_lease_is_charged_whole_and_only_once(bench: Bench) -> None:
    begin, claim = 1_000_000_000, Claim(TOKENS, hold=80)
    await bench.reserve("dead", claim, Claim(CONCURRENT, hold=1))
    await bench.at(begin + 14_999)
    assert await bench.sums(TOKENS) == (0, 80)
    await bench.at(begin + 15_000)
    assert await bench.sums(TOKENS) == (80, 0)
    assert await bench.sums(CONCURRENT) == (0, 0)
    both = [claim, Claim(CONCURRENT, hold=1)]
    for _ in range(2):  # its gateway wakes up, and it has ended
        await bench.store.charge(SCOPE, [Charge("dead", both, [20, 0], ended=True)])
        assert await bench.sums(TOKENS) == (80, 0)
    await bench.at(begin + 15_000 + 60_500)
    assert await bench.sums(TOKENS) == (0, 0)


async def test_what_goes_on_after_its_lease_ran_out_holds_what_it_may_still_use(bench: Bench) -> None:
    claims = [Claim(TOKENS, hold=40), Claim(CONCURRENT, hold=1)]
    await bench.reserve("slept", *claims)
    await bench.at(1_000_015_000)
    assert await bench.sums(TOKENS) == (40, 0)
    for used, sums in ((10, (40, 30)), (30, (60, 10))):
        await bench.store.charge(SCOPE, [Charge("slept", claims, [used, 0], ended=False)])
        assert await bench.sums(TOKENS) == sums
        assert await bench.sums(CONCURRENT) == (0, 1)
    await bench.store.charge(SCOPE, [Charge("slept", claims, [35, 0], ended=True)])
    assert await bench.sums(TOKENS) == (65, 0)
    assert await bench.sums(CONCURRENT) == (0, 0)


async def test_no_lease_runs_out_before_redis_has_answered_for_as_long(bench: Bench, redis_url: str) -> None:
    begin, claim = 1_000_000_000, Claim(TOKENS, hold=80)
    await bench.reserve("a", claim)
    late = Bench(redis_url, now_s=1_000_020)
    for second, sums in ((20, (0, 80)), (34, (0, 80)), (35, (80, 0))):
        await late.at(begin + second * 1000)
        assert await late.sums(TOKENS) == sums
    await late.client.close()


async def test_a_renewed_lease_goes_on(bench: Bench) -> None:
    claim = Claim(TOKENS, hold=80)
    await bench.reserve("a", claim)
    for second in (10, 20, 30):
        await bench.at(1_000_000_000 + second * 1000)
        await bench.charge("a", claim, 10, ended=False)
    assert await bench.sums(TOKENS) == (10, 70)


async def test_settling_twice_changes_nothing(bench: Bench) -> None:
    claim = Claim(TOKENS, hold=80)
    await bench.reserve("a", claim)
    for _ in range(2):
        await bench.charge("a", claim, 10)
    assert await bench.sums(TOKENS) == (10, 0)


async def test_what_redis_forgot_is_there_again(bench: Bench) -> None:
    claim = Claim(TOKENS, hold=80)
    await bench.reserve("a", claim)
    await bench.client.command("DEL", *limit_keys(SCOPE))
    await bench.charge("a", claim, 10, ended=False)
    assert await bench.sums(TOKENS) == (10, 70)
    await bench.charge("a", claim, 20)
    assert await bench.sums(TOKENS) == (20, 0)


async def test_large_amounts_are_exact(bench: Bench) -> None:
    money = Meter("money", 2**52, 31 * 24 * 3_600_000)
    claim = Claim(money, hold=2**51 + 1)
    assert await bench.reserve("a", claim)
    await bench.charge("a", claim, 2**51)
    assert await bench.sums(money) == (2**51, 0)
    assert await bench.reserve("b", Claim(money, hold=2**51))
    assert not await bench.reserve("c", Claim(money, hold=1))


async def test_the_keys_expire_when_nobody_comes(bench: Bench) -> None:
    await bench.reserve("a", Claim(TOKENS, hold=1))
    lives = [await bench.client.command("PTTL", key) for key in limit_keys(SCOPE)]
    assert all(life > 31 * 24 * 3_600_000 for life in lives)


async def test_many_callers_over_two_clients_never_exceed_and_leave_nothing(redis_url: str) -> None:
    limit = 2_000
    meters = [Meter("tokens", limit, MINUTE), Meter("concurrent", 16, 0)]
    clients = [RedisClient(redis_url) for _ in range(2)]
    stores = [LimitStore(client) for client in clients]
    running = spent = refused = 0

    async def call(number: int) -> None:
        nonlocal running, spent, refused
        draw = random.Random(number)
        store, claims = stores[number % 2], [Claim(meters[0], hold=draw.randint(1, 40)), Claim(meters[1], hold=1)]
        while True:
            reserved, standings, _ = await store.reserve(SCOPE, f"r{number}", claims)
            if reserved:
                break
            if standings[0].used + claims[0].hold > limit:  # no matter what is given back
                refused += 1
                return
        running += 1
        assert running <= 16
        used = draw.randint(0, claims[0].hold)
        await store.charge(SCOPE, [Charge(f"r{number}", claims, [used // 2, 0], ended=False)])
        spent += used
        assert spent <= limit
        running -= 1
        await store.charge(SCOPE, [Charge(f"r{number}", claims, [used, 0], ended=True)])

    await asyncio.gather(*(call(number) for number in range(300)))
    tokens, concurrent = await stores[0].look(SCOPE, meters)
    assert (tokens.used, tokens.held, concurrent.held) == (spent, 0, 0)
    assert refused and spent >= 0.95 * limit
    for client in clients:
        await client.close()


async def test_an_entry_is_added_with_what_is_reserved_or_not_at_all(redis_url: str) -> None:
    client = RedisClient(redis_url)
    store, claims, entry = LimitStore(client), [Claim(CONCURRENT, hold=1)], StreamEntry("a stream", "field", b"\0value")
    assert (await store.reserve(SCOPE, "without", [Claim(REQUESTS, count=1)])).entry_id == ""
    while (
        reserved := await store.reserve(SCOPE, f"r{await client.command('XLEN', 'a stream')}", claims, entry)
    ).reserved:
        assert await client.command("XRANGE", "a stream", reserved.entry_id, "+") == [
            (reserved.entry_id.encode(), {b"field": b"\0value"})
        ]
    assert (reserved.entry_id, await client.command("XLEN", "a stream")) == ("", CONCURRENT.limit)
    assert await client.command("PTTL", "a stream") == -1
    await client.close()


async def test_the_scripts_keep_to_one_slot_of_a_cluster(tmp_path: Path, redis_server: RedisServer) -> None:
    server = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    client = RedisClient(server.url)
    await client.command("CLUSTER", "ADDSLOTS", *range(16384))
    # Redis tells of no event when it has settled.
    state = "return redis.call('CLUSTER', 'INFO')"
    while b"cluster_state:ok" not in await client.command("EVAL", state, 0):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    store, claims = LimitStore(client), [Claim(TOKENS, hold=5), Claim(REQUESTS, count=1), Claim(CONCURRENT, hold=1)]
    assert (await store.reserve("group:g}{", "a", claims))[0]
    await store.charge("group:g}{", [Charge("a", claims, [3, 0], ended=True)])
    tokens, *_ = await store.look("group:g}{", [TOKENS])
    assert (tokens.used, tokens.held) == (3, 0)
    await client.close()
    server.kill()


def test_all_keys_of_a_scope_share_one_hash_tag() -> None:
    for scope in ("key:a", "group:}{", "group:ü b"):
        keys = limit_keys(scope)
        assert len({redis_library.cluster.key_slot(key.encode()) for key in keys}) == 1
        assert len({key[key.index("{") : key.index("}") + 1] for key in keys}) == 1
