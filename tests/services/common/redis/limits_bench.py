"""Limits on a real Redis whose clock a test sets."""

from dataclasses import dataclass

from services.common.redis import scripts
from services.common.redis.client import RedisClient
from services.common.redis.limits import Charge, Claim, LimitStore, Meter
from services.common.redis.scripts import Script

SCOPE = "key:k{1}"
MINUTE = 60_000
LEASE_S = 15.0


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
        reserved, self.standings, _ = await self.store.reserve(SCOPE, reservation_id, claims)
        return reserved

    async def charge(self, reservation_id: str, claim: Claim, used: int, *, ended: bool = True) -> None:
        await self.store.charge(SCOPE, [Charge(reservation_id, [claim], [used], ended)])

    async def sums(self, meter: Meter) -> tuple[int, int]:
        (standing,) = await self.store.look(SCOPE, [meter])
        return standing.used, standing.held


def scripts_with_clock() -> Scripts:
    return Scripts(with_clock(scripts.RESERVE), with_clock(scripts.CHARGE))
