"""Meters in hypothesis' hands: whatever happens in whatever order, Redis says what a plain model says."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.redis.limits import Charge, Claim, Meter
from tests.redis_server import RedisServer
from tests.services.common.redis.limits_bench import LEASE_S, MINUTE, SCOPE, Bench

LIMITS = {
    # Of two keys, and one that both share.
    "a": [Meter("a tokens", 100, MINUTE), Meter("a requests", 4, MINUTE), Meter("a concurrent", 2, 0)],
    "b": [Meter("b tokens", 60, MINUTE)],
}
SHARED = Meter("budget", 200, 10 * MINUTE)
# So long is remembered that a lease ran out.
LAST_WORDS_MS = 10 * MINUTE


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
    # Those whose leases ran out, and when that was noticed.
    expired: dict[str, tuple[Running, int]] = field(default_factory=dict)

    def expire(self, now: int) -> None:
        lease = int(LEASE_S * 1000)
        for name, one in list(self.running.items()):
            if now >= one.renewed_at + lease:
                so_far = one.used
                self.charge(one, [claim.hold for claim in one.holding], one.renewed_at + lease)
                one.used = so_far
                self.expired[name] = self.running.pop(name), now

    def revive(self, name: str, used: list[int], now: int) -> None:
        """Its gateway woke up: it was charged as a whole, and goes on beside that."""
        one, noticed_at = self.expired.pop(name)
        one.used, one.renewed_at = used, now
        if now >= noticed_at + LAST_WORDS_MS:  # nobody knows it any more
            for claim, amount in zip(one.holding, used, strict=True):
                if claim.meter.window_ms:
                    self.used.append((claim.meter.name, now, amount))
        self.running[name] = one

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
        elif action == "late" and self.model.expired:
            await self.charge_late(bench, amount)
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
        """One that runs, whichever; and again one that has ended, which changes nothing."""
        name, one = list(self.model.running.items())[amount % len(self.model.running)]
        used = more_of(one, amount)
        again = [Charge(name, one.claims, used, ended)] if ended else []
        await bench.store.charge(SCOPE, [Charge(name, one.claims, used, ended), *again])
        self.model.charge(one, used, self.now)
        one.renewed_at = self.now
        if ended:
            del self.model.running[name]

    async def charge_late(self, bench: Bench, amount: int) -> None:
        """One whose lease ran out: it goes on, or ends."""
        name, (one, _) = list(self.model.expired.items())[amount % len(self.model.expired)]
        used, ended = more_of(one, amount), amount % 3 == 0
        await bench.store.charge(SCOPE, [Charge(name, one.claims, used, ended)])
        if ended:
            del self.model.expired[name]
        else:
            self.model.revive(name, used, self.now)


def more_of(one: Running, amount: int) -> list[int]:
    """What it has used by now, of each claim that holds."""
    return [
        min(before + amount, claim.hold) if claim.meter.window_ms else 0
        for claim, before in zip(one.holding, one.used, strict=True)
    ]


PAUSES = st.one_of(
    st.integers(0, 40_000),
    st.sampled_from([0, 1, 499, 500, 14_500, 14_999, 15_000, 59_500, 59_999, 60_000, 60_499, 60_500, 600_000]),
)
STEPS = st.lists(
    st.tuples(PAUSES, st.sampled_from(["reserve", "renew", "end", "late"]), st.sampled_from("ab"), st.integers(1, 60)),
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
