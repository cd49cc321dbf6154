"""Meters on a real Redis: against a plain model in hypothesis' hands, by many at once, and with its own clock."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

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

    def __init__(self, url: str, *, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self.client = RedisClient(url, clock=lambda: self.now_s)
        self.store = LimitStore(self.client, lease_s=LEASE_S)

    async def at(self, ms: int) -> None:
        self.now_s = ms / 1000
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


LIMITS = {
    # Of two keys, and one that both share.
    "a": [Meter("a tokens", 100, MINUTE), Meter("a requests", 4, MINUTE), Meter("a concurrent", 2, 0)],
    "b": [Meter("b tokens", 60, MINUTE)],
}
SHARED = Meter("budget", 200, 10 * MINUTE)


def claims_of(key: str, amount: int) -> list[Claim]:
    kinds = {"tokens": Claim(LIMITS[key][0], hold=amount), "budget": Claim(SHARED, hold=2 * amount)}
    if key == "a":
        kinds |= {"requests": Claim(LIMITS[key][1], count=1), "concurrent": Claim(LIMITS[key][2], hold=1)}
    return list(kinds.values())


@dataclass
class Running:
    claims: list[Claim]
    renewed_at: int
    # Per claim that holds.
    used: list[int]

    @property
    def holding(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.hold]


@dataclass
class Model:
    """The same in plain words: all that was used with its time, and all that runs."""

    used: list[tuple[str, int, int]] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)

    def expire(self, now: int) -> None:
        lease = int(LEASE_S * 1000)
        for name, one in list(self.running.items()):
            if now >= one.renewed_at + lease:
                self.charge(one, [claim.hold for claim in one.holding], one.renewed_at + lease)
                del self.running[name]

    def charge(self, one: Running, used: list[int], at: int) -> None:
        for claim, before, after in zip(one.holding, one.used, used, strict=True):
            if claim.meter.window_ms:
                self.used.append((claim.meter.name, at, after - before))
        one.used = used

    def within(self, meter: Meter, now: int, window: int) -> int:
        """Used within the window before now."""
        return sum(amount for name, at, amount in self.used if name == meter.name and now - at < window)

    def held(self, meter: Meter) -> int:
        return sum(
            claim.hold - used
            for one in self.running.values()
            for claim, used in zip(one.holding, one.used, strict=True)
            if claim.meter == meter
        )

    def excess(self, claim: Claim, now: int, window: int) -> int:
        """By how much a limit would be exceeded."""
        wanted = claim.hold + claim.count
        return self.within(claim.meter, now, window) + self.held(claim.meter) + wanted - claim.meter.limit


class Walk:
    """Does the same on Redis, by two clients, and on the model; and compares."""

    def __init__(self, url: str) -> None:
        self.benches = [Bench(url), Bench(url)]
        self.model = Model()
        self.now = 1_700_000_000_000
        self.names = 0

    async def step(self, pause: int, action: str, key: str, amount: int) -> None:
        self.now += pause
        for bench in self.benches:
            await bench.at(self.now)
        self.model.expire(self.now)
        bench = self.benches[amount % 2]
        if action == "reserve":
            await self.reserve(bench, claims_of(key, amount))
        elif self.model.running:
            await self.charge(bench, amount, ended=action == "end")
        for meter in (*LIMITS["a"], *LIMITS["b"], SHARED):
            used, held = await bench.sums(meter)
            longest = meter.longest_ms
            assert held == self.model.held(meter)
            assert self.model.within(meter, self.now, meter.window_ms) <= used
            assert used <= self.model.within(meter, self.now, longest)

    async def reserve(self, bench: Bench, claims: list[Claim]) -> None:
        self.names += 1
        reserved = await bench.reserve(f"r{self.names}", *claims)
        if not reserved:
            excesses = [self.model.excess(claim, self.now, claim.meter.longest_ms) for claim in claims]
            assert max(excesses) > 0, "refused only for a reason"
            return
        assert all(self.model.excess(claim, self.now, claim.meter.window_ms) <= 0 for claim in claims), "never over"
        one = Running(claims, self.now, [])
        one.used = [0] * len(one.holding)
        self.model.running[f"r{self.names}"] = one
        self.model.used += [(claim.meter.name, self.now, claim.count) for claim in claims if claim.count]

    async def charge(self, bench: Bench, amount: int, *, ended: bool) -> None:
        name, one = next(iter(self.model.running.items()))
        used = [
            min(before + amount, claim.hold) if claim.meter.window_ms else 0
            for claim, before in zip(one.holding, one.used, strict=True)
        ]
        await bench.store.charge(SCOPE, [Charge(name, one.claims, used, ended)])
        self.model.charge(one, used, self.now)
        one.renewed_at = self.now
        if ended:
            del self.model.running[name]


PAUSES = st.one_of(
    st.integers(0, 40_000),
    st.sampled_from([0, 1, 499, 500, 14_500, 14_999, 15_000, 59_500, 59_999, 60_000, 60_499, 60_500, 600_000]),
)
STEPS = st.lists(
    st.tuples(PAUSES, st.sampled_from(["reserve", "renew", "end"]), st.sampled_from("ab"), st.integers(1, 60)),
    max_size=40,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_the_windows_hold(
    redis_server: RedisServer, own_clock: None, steps: list[tuple[int, str, str, int]]
) -> None:
    async def run() -> None:
        walk = Walk(redis_server.url)
        for pause, action, key, amount in steps:
            await walk.step(pause, action, key, amount)
        for bench in walk.benches:
            await bench.client.close()

    redis_server.flush()
    asyncio.run(run())


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
            reserved, standings = await store.reserve(SCOPE, f"r{number}", claims)
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
