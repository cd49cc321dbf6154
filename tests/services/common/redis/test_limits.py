"""Meters on a real Redis: against a plain model in hypothesis' hands, by many at once, and with its own clock."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import redis as redis_library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.redis import limits as limits_module
from services.common.redis import scripts
from services.common.redis.client import RedisClient
from services.common.redis.keys import limit_keys
from services.common.redis.limits import Charge, Claim, LimitStore, Meter
from services.common.redis.scripts import Script
from tests.redis_server import RedisServer

SCOPE = "key:k{1}"
MINUTE = 60_000
LEASE_S = 15.0
TOKENS = Meter("tokens", 100, MINUTE)
REQUESTS = Meter("requests", 3, MINUTE)
CONCURRENT = Meter("concurrent", 2, 0)


@dataclass(frozen=True)
class Scripts:
    """The scripts with a clock that a test sets."""

    RESERVE: Script
    CHARGE: Script


def with_clock(script: Script) -> Script:
    text = script.text.replace("redis.call('TIME')", "redis.call('HMGET', 'clock', 's', 'us')")
    assert text != script.text
    return Script.of(text)


class Bench:
    """Limits whose time stands still until a test moves it."""

    def __init__(self, url: str) -> None:
        self.client = RedisClient(url)
        self.store = LimitStore(self.client, lease_s=LEASE_S)

    async def at(self, ms: int) -> None:
        await self.client.command("HSET", "clock", "s", ms // 1000, "us", ms % 1000 * 1000)

    async def reserve(self, reservation_id: str, *claims: Claim) -> bool:
        reserved, self.standings = await self.store.reserve(SCOPE, reservation_id, claims)
        return reserved

    async def charge(self, reservation_id: str, claim: Claim, used: int, *, ended: bool = True) -> None:
        await self.store.charge(SCOPE, [Charge(reservation_id, [claim], [used], ended)])

    async def sums(self, meter: Meter) -> tuple[int, int]:
        (standing,) = await self.store.look(SCOPE, [meter])
        return standing.used, standing.held


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "scripts", Scripts(with_clock(scripts.RESERVE), with_clock(scripts.CHARGE)))


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
    for ended in (False, True, True):  # its gateway wakes up
        await bench.store.charge(SCOPE, [Charge("dead", both, [20, 0], ended)])
        assert await bench.sums(TOKENS) == (80, 0)
    await bench.at(begin + 15_000 + 60_500)
    assert await bench.sums(TOKENS) == (0, 0)


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


@dataclass
class Reserved:
    amount: int
    used: int = 0
    renewed_at: int = 0


@dataclass
class Model:
    """The same in plain words: everything used with its time, and everything held."""

    limit: int
    used: list[tuple[int, int]] = field(default_factory=list)
    running: dict[str, Reserved] = field(default_factory=dict)

    def expire(self, now: int) -> None:
        for name, reserved in list(self.running.items()):
            if now >= reserved.renewed_at + LEASE_S * 1000:
                at = reserved.renewed_at + int(LEASE_S * 1000)
                self.used.append((at, reserved.amount - reserved.used))
                del self.running[name]

    def within(self, now: int, window: int) -> int:
        """Used within the window before now."""
        return sum(amount for at, amount in self.used if now - at < window)

    def held(self) -> int:
        return sum(reserved.amount - reserved.used for reserved in self.running.values())


STEPS = st.lists(
    st.tuples(st.integers(0, 20_000), st.sampled_from(["reserve", "renew", "end"]), st.integers(1, 60)), max_size=40
)


@pytest.fixture
def plain(redis_server: RedisServer, own_clock: None) -> Iterator[RedisServer]:
    yield redis_server


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_the_windows_hold(plain: RedisServer, steps: list[tuple[int, str, int]]) -> None:
    plain.flush()
    asyncio.run(walk(plain.url, steps))


async def walk(url: str, steps: list[tuple[int, str, int]]) -> None:
    bench, model, now = Bench(url), Model(TOKENS.limit), 1_700_000_000_000
    names = 0
    for pause, action, amount in steps:
        now += pause
        await bench.at(now)
        model.expire(now)
        if action == "reserve":
            names += 1
            reserved = await bench.reserve(f"r{names}", Claim(TOKENS, hold=amount))
            wanted = model.held() + amount
            if reserved:
                assert model.within(now, MINUTE) + wanted <= TOKENS.limit, "never over"
                model.running[f"r{names}"] = Reserved(amount, renewed_at=now)
            else:
                assert model.within(now, MINUTE + 500) + wanted > TOKENS.limit, "refused only for a reason"
        elif model.running:
            name, one = next(iter(model.running.items()))
            news = min(amount, one.amount - one.used)
            one.used, one.renewed_at = one.used + news, now
            model.used.append((now, news))
            await bench.charge(name, Claim(TOKENS, hold=one.amount), one.used, ended=action == "end")
            if action == "end":
                del model.running[name]
        used, held = await bench.sums(TOKENS)
        assert held == model.held()
        assert model.within(now, MINUTE) <= used <= model.within(now, MINUTE + 500)
    await bench.client.close()


async def test_many_callers_over_two_clients_never_exceed_and_leave_nothing(redis_url: str) -> None:
    limit = 5_000
    meters = [Meter("tokens", limit, MINUTE), Meter("concurrent", 16, 0)]
    clients = [RedisClient(redis_url) for _ in range(2)]
    stores = [LimitStore(client) for client in clients]
    running = spent = refused = 0

    async def call(number: int) -> None:
        nonlocal running, spent, refused
        draw = random.Random(number)
        store, claims = stores[number % 2], [Claim(meters[0], hold=draw.randint(1, 40)), Claim(meters[1], hold=1)]
        while True:
            reserved, standings = await store.reserve(SCOPE, f"r{number}", claims)
            if reserved:
                break
            if standings[0].fits_in_ms:
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

    await asyncio.gather(*(call(number) for number in range(600)))
    tokens, concurrent = await stores[0].look(SCOPE, meters)
    assert (tokens.used, tokens.held, concurrent.held) == (spent, 0, 0)
    assert refused and spent >= 0.95 * limit
    for client in clients:
        await client.close()


def test_all_keys_of_a_scope_share_one_hash_tag() -> None:
    for scope in ("key:a", "group:}{", "group:ü b"):
        keys = limit_keys(scope)
        assert len({redis_library.cluster.key_slot(key.encode()) for key in keys}) == 1
        assert len({key[key.index("{") : key.index("}") + 1] for key in keys}) == 1
