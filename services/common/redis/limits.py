"""Meters that any number of gateways share: a reservation is made on all meters of a request or on none.

What may be used is held from the reservation on; what was used meanwhile is charged by the renewals, and the rest given
back at the end. A reservation whose lease runs out is charged as a whole. Sums never exceed a limit, whatever runs side
by side: every call is one script. Knows nothing of tokens or money: a meter counts whole numbers of anything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.common.redis import scripts
from services.common.redis.client import Argument, RedisClient
from services.common.redis.keys import StreamEntry, limit_keys

LEASE_S = 15.0
"""How long a reservation outlives the last sign of life of its gateway. Three times the queue's lease, so that a
gateway that stood still for some seconds finds its reservations as it left them."""

_BUCKETS = 120  # of a window, as in meters.lua


@dataclass(frozen=True, slots=True)
class Meter:
    """At most `limit` within any `window_ms`, a multiple of 120; 0: only what running requests hold counts."""

    # Unique within its scope.
    name: str
    limit: int
    window_ms: int

    @property
    def longest_ms(self) -> int:
        """For how long what is used may count: to the end of its bucket, and the window from there."""
        return self.window_ms + self.window_ms // _BUCKETS


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request needs of a meter: an amount held until it ends, or an amount that counts as used at once."""

    meter: Meter
    hold: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """A meter as a reservation found it."""

    claim: Claim
    used: int
    held: int
    # Ms until nothing is used any more, if nothing is added.
    unused_in_ms: int
    # Ms until the claim fits; 0: it fits; None: it waits for what running requests hold.
    fits_in_ms: int | None


class Reserved(NamedTuple):
    """What came of a reservation."""

    reserved: bool
    # How each meter stood before.
    standings: list[Standing]
    # Of what was added to a stream; empty: nothing was.
    entry_id: str


@dataclass(frozen=True, slots=True)
class Charge:
    """What a reservation has used so far, per claim that holds, in the order of its claims."""

    id: str
    claims: Sequence[Claim]
    used: Sequence[int]
    ended: bool


class LimitStore:
    """The meters of all scopes. All raise Unavailable when Redis does not answer."""

    def __init__(self, redis: RedisClient, *, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._lease_ms = int(lease_s * 1000)

    async def reserve(
        self, scope: str, reservation_id: str, claims: Sequence[Claim], entry: StreamEntry | None = None
    ) -> Reserved:
        """Reserves all claims or none. Once they are, adds the entry to its stream, in the same step of Redis."""
        stream, field, value = entry or ("", "", "")
        arguments: list[Argument] = [reservation_id, self._lease_ms, self._may_expire(), field, value]
        for claim in claims:
            arguments += (claim.meter.name, claim.meter.limit, claim.meter.window_ms, claim.hold, claim.count)
        keys = [*limit_keys(scope), stream] if entry else limit_keys(scope)
        reserved, entry_id, *rows = await self._redis.script(scripts.RESERVE, keys, arguments)
        standings = [_standing(claim, row) for claim, row in zip(claims, rows, strict=True)]
        return Reserved(bool(reserved), standings, entry_id.decode())

    async def look(self, scope: str, meters: Iterable[Meter]) -> list[Standing]:
        """How meters stand."""
        return (await self.reserve(scope, "", [Claim(meter) for meter in meters])).standings

    async def charge(self, scope: str, charges: Sequence[Charge]) -> None:
        """Charges what was used, renews the leases of what goes on, and gives back what ended reservations still hold.
        Doing it again changes nothing. Without charges it only sees to the leases of others that ran out.
        """
        arguments: list[Argument] = [self._lease_ms, self._may_expire()]
        for charge in charges:
            holding = [claim for claim in charge.claims if claim.hold]
            arguments += (charge.id, int(charge.ended), len(holding))
            for claim, used in zip(holding, charge.used, strict=True):
                arguments += (claim.meter.name, claim.meter.window_ms, claim.hold, used)
        # What ended gives back what callers may be waiting for.
        hurry = any(charge.ended for charge in charges)
        await self._redis.script(scripts.CHARGE, limit_keys(scope), arguments, hurry=hurry)

    def _may_expire(self) -> int:
        """1 once Redis has answered for a full lease: every gateway that lives has renewed its reservations since."""
        return int(self._redis.answering_s * 1000 >= self._lease_ms)


def _standing(claim: Claim, row: Sequence[int]) -> Standing:
    used, held, unused_in_ms, fits_in_ms = row
    return Standing(claim, used, held, unused_in_ms, None if fits_in_ms < 0 else fits_in_ms)
