"""What a key may use: reserves the most that a request can take, charges what it took, and says how its limits stand.

A request is held to its limits by two scripts in Redis, the one that enqueues it and one at its end; in between, while
it runs, the tokens it has so far are reported every few seconds with the renewals of all reservations. A request that
begins pays for its prompt and for what was produced, one that never does pays nothing, and all count as requests.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.common.errors import Unavailable
from services.common.redis.limits import LEASE_S, Charge, Claim, LimitStore
from services.common.redis.queue import JobQueue, queue_entry
from services.gateway.active_request import ActiveRequest
from services.gateway.keys.account import Limit
from services.gateway.keys.limit_answers import check_size, refusal
from services.gateway.keys.prices import Price, Prices
from services.gateway.request import Usage

log = logging.getLogger(__name__)

_RENEW_EVERY_S = LEASE_S / 3
_RETRY_EVERY_S = 1.0
_CHARGES_PER_SCRIPT = 100
# For so long after its last request of a scope a gateway sees to what others left behind there.
_SWEEPS_S = 3 * LEASE_S


@dataclass(slots=True)
class _Reservation:
    """What an unfinished request has reserved."""

    active: ActiveRequest
    scope: str
    limits: Sequence[Limit]
    claims: Sequence[Claim]
    price: Price | None
    # Redis has said that it is reserved.
    confirmed: bool = False
    ended: bool = False

    def charge(self) -> Charge:
        usage = self.active.usage() if self.active.begun else Usage(0, 0, 0)
        held = [limit for limit, claim in zip(self.limits, self.claims, strict=True) if claim.hold]
        return Charge(self.active.id, self.claims, [self._used(limit, usage) for limit in held], self.ended)

    def _used(self, limit: Limit, usage: Usage) -> int:
        if limit.name == "concurrent":
            return 0
        if limit.name == "money_per_month":
            assert self.price is not None, "a budget of money needs a price"
            return self.price.cost(usage)
        return usage.prompt_tokens + usage.completion_tokens


class KeyLimits:
    """The reservations of this gateway's requests. `run` charges and renews them."""

    def __init__(self, store: LimitStore, prices: Prices) -> None:
        self._store = store
        self._prices = prices
        self._open: dict[str, _Reservation] = {}
        # Scopes of late, each with the loop time of its last request.
        self._scopes: dict[str, float] = {}
        self._news = asyncio.Event()
        self._changed = asyncio.Event()
        # Why nothing can be reserved now: Redis may have lost what is reserved already.
        self._problem: str | None = None

    @property
    def reservations(self) -> int:
        """How many are not settled yet."""
        return len(self._open)

    def reserved(self, name: str) -> int:
        """What all of them hold of the limits of that name, in the meters' units."""
        return sum(
            claim.hold
            for reservation in self._open.values()
            for limit, claim in zip(reservation.limits, reservation.claims, strict=True)
            if limit.name == name
        )

    async def reserve_and_enqueue(self, active: ActiveRequest, queue: JobQueue) -> str:
        """Reserves what a request may take, and adds its job to the queue: returns its entry. `settle` follows, however
        it ends.

        Raises LimitReached, QuotaExhausted, InvalidRequest for what never fits, NotAllowed, Unavailable.
        """
        account = active.request.caller.account
        if account.in_use is None or not account.in_use.limits:
            return await queue.enqueue(active.job)
        if self._problem is not None:
            raise Unavailable(self._problem)
        reservation = self._plan(active, account.in_use.limits, account.in_use.scope)
        for limit, claim in zip(reservation.limits, reservation.claims, strict=True):
            check_size(limit, claim.hold + claim.count)
        self._open[active.id] = reservation
        self._scopes[reservation.scope] = asyncio.get_running_loop().time()
        try:
            reserved, standings, entry_id = await self._store.reserve(
                reservation.scope, active.id, reservation.claims, queue_entry(active.job)
            )
        except Unavailable as error:
            self._lost_touch(error)
            raise
        account.standings = list(zip(reservation.limits, standings, strict=True))
        account.reserved = reservation.confirmed = reserved
        if not reserved:
            del self._open[active.id]
            raise refusal(account.standings)
        return entry_id

    def take_over(self, active: ActiveRequest) -> None:
        """Goes on with what a dead gateway reserved for a request, from the next renewal on. `settle` follows."""
        in_use = active.request.caller.account.in_use
        if in_use is None or not in_use.limits:
            return
        self._open[active.id] = reservation = self._plan(active, in_use.limits, in_use.scope)
        self._scopes[in_use.scope] = asyncio.get_running_loop().time()
        reservation.confirmed = True

    def settle(self, active: ActiveRequest) -> None:
        """Charges what a request took and gives the rest back, in the background; unless another gateway goes on."""
        if active.abandoned:
            self._open.pop(active.id, None)
            self._changed.set()
        elif (reservation := self._open.get(active.id)) is not None:
            reservation.ended = True
            self._news.set()

    async def run(self) -> None:
        """Charges what has ended at once, and what goes on with the renewals, until cancelled."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time()
        while True:
            await _wait(self._news, renew_at)
            self._news.clear()
            if due := loop.time() >= renew_at:
                renew_at = loop.time() + _RENEW_EVERY_S
            try:
                await self._tell(everything=due)
            except Unavailable as error:
                self._lost_touch(error)
                await asyncio.sleep(_RETRY_EVERY_S)
            except Exception:
                log.exception("the reservations could not be charged")
                self._news.set()
                await asyncio.sleep(_RETRY_EVERY_S)

    async def wait_settled(self, timeout_s: float) -> None:
        """Waits until nothing is reserved any more."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._open:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.warning("%d requests could not be settled in Redis: they are charged whole", len(self._open))

    def _plan(self, active: ActiveRequest, limits: Sequence[Limit], scope: str) -> _Reservation:
        """What to reserve."""
        request = active.request
        completion_tokens = request.choices * request.stopping.max_tokens
        needs_price = any(limit.name == "money_per_month" for limit in limits)
        price = self._prices.of(request.model.name) if needs_price else None
        amounts = {
            "requests_per_minute": 1,
            "concurrent": 1,
            "tokens_per_minute": len(request.prompt_ids) + completion_tokens,
            "tokens_per_day": len(request.prompt_ids) + completion_tokens,
            "money_per_month": price.worst(len(request.prompt_ids), completion_tokens) if price else 0,
        }
        claims = [_claim(limit, amounts[limit.name]) for limit in limits]
        return _Reservation(active, scope, limits, claims, price)

    async def _tell(self, *, everything: bool) -> None:
        """Tells Redis of what has ended; or of all there is, and always of all when it may have lost some."""
        problem = self._problem
        everything = everything or problem is not None
        by_scope: dict[str, list[_Reservation]] = defaultdict(list)
        if everything:
            by_scope.update((scope, []) for scope in self._recent_scopes())
        for reservation in self._open.values():
            if reservation.ended or (everything and reservation.confirmed):
                by_scope[reservation.scope].append(reservation)
        await asyncio.gather(
            *(
                self._charge(scope, due[start : start + _CHARGES_PER_SCRIPT])
                for scope, due in by_scope.items()
                for start in range(0, max(1, len(due)), _CHARGES_PER_SCRIPT)
            )
        )
        if self._problem is problem:  # and no other has come up meanwhile
            self._problem = None

    def _recent_scopes(self) -> Iterable[str]:
        oldest = asyncio.get_running_loop().time() - _SWEEPS_S
        self._scopes = {scope: used_at for scope, used_at in self._scopes.items() if used_at > oldest}
        return self._scopes

    async def _charge(self, scope: str, part: Sequence[_Reservation]) -> None:
        ended = [reservation for reservation in part if reservation.ended]
        await self._store.charge(scope, [reservation.charge() for reservation in part])
        for reservation in ended:
            self._open.pop(reservation.active.id, None)
        self._changed.set()

    def _lost_touch(self, error: Unavailable) -> None:
        """Nothing is reserved until all that is reserved already has been told to Redis again."""
        if self._problem is None:
            log.warning("nothing can be reserved now: %s", error.message)
        self._problem = f"The limits of keys cannot be looked at now: {error.message}"
        self._news.set()


def _claim(limit: Limit, amount: int) -> Claim:
    """A request counts when it comes in; what it takes beside that is held until it is known."""
    if limit.name == "requests_per_minute":
        return Claim(limit.meter, count=amount)
    return Claim(limit.meter, hold=amount)


async def _wait(news: asyncio.Event, until: float) -> None:
    """Returns when there is news, or at that loop time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await news.wait()
