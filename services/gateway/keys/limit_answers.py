"""How limits are told to callers: the sentence of a refusal, when to come back, OpenAI's `x-ratelimit-*` headers."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal

from services.common.api_keys import MICROS
from services.common.errors import InvalidRequest, Overloaded
from services.common.redis.limits import Standing
from services.gateway.errors import LimitReached, QuotaExhausted
from services.gateway.keys.account import Account, Limit

Row = tuple[Limit, Standing]

_BUDGETS = ("tokens_per_day", "money_per_month")
_UNITS: Mapping[str, str] = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "concurrent": "requests at once",
    "tokens_per_day": "tokens per day",
    "money_per_month": "money per month",
}
_HEADERS = (("requests", "requests_per_minute"), ("tokens", "tokens_per_minute"))
# What runs may end at any moment, for less than it holds.
_RETRY_WHEN_HELD_S = 1


def check_size(limit: Limit, amount: int) -> None:
    """Raises InvalidRequest if a limit is too small for a request that may take this amount, whatever else runs."""
    if amount > limit.meter.limit:
        raise InvalidRequest(
            f"This request may take {_amount(limit, amount)} {_UNITS[limit.name].split(' per ')[0]}, but the limit of "
            f"{limit.owner} is {_amount(limit, limit.meter.limit)} {_UNITS[limit.name]}: ask for fewer max_tokens.",
            field="max_tokens",
        )


def refusal(rows: Sequence[Row]) -> Overloaded:
    """The error for a request that does not fit now, about the limit that has room for it last."""
    limit, standing = max((row for row in rows if row[1].fits_in_ms != 0), key=lambda row: row[1].fits_in_ms or 0)
    wait_ms = standing.fits_in_ms
    retry_after_s = _RETRY_WHEN_HELD_S if wait_ms is None else math.ceil(wait_ms / 1000)
    room = "when some of these end" if wait_ms is None else f"in {retry_after_s} s"
    most = _amount(limit, limit.meter.limit)
    message = f"The limit of {limit.owner} is {most} {_UNITS[limit.name]}: {_taken(limit, standing)}; it fits {room}."
    kind = QuotaExhausted if limit.name in _BUDGETS else LimitReached
    return kind(message, retry_after_s=retry_after_s)


def _taken(limit: Limit, standing: Standing) -> str:
    """What stands in the way of a request, and what it may take itself."""
    used, held = _amount(limit, standing.used), _amount(limit, standing.held)
    if limit.name == "concurrent":
        return f"{held} are unfinished, and this is one more"
    if limit.name == "requests_per_minute":
        return f"{used} are used, and this is one more"
    unfinished = f", {held} are held by unfinished requests" if standing.held else ""
    return f"{used} are used{unfinished}, and this request may take {_amount(limit, standing.claim.hold)}"


def rate_limit_headers(account: Account) -> list[tuple[bytes, bytes]]:
    """How the limits per minute stand after this request: of key and group the one that has less left."""
    headers: list[tuple[bytes, bytes]] = []
    for suffix, name in _HEADERS:
        rows = [standing for limit, standing in account.standings if limit.name == name]
        if rows:
            standing = min(rows, key=lambda one: _remaining(one, account.reserved))
            told = (
                ("limit", str(standing.claim.meter.limit)),
                ("remaining", str(_remaining(standing, account.reserved))),
                ("reset", format_ms(_reset_ms(standing, account.reserved))),
            )
            headers += [(f"x-ratelimit-{word}-{suffix}".encode(), value.encode()) for word, value in told]
    return headers


def format_ms(milliseconds: int) -> str:
    """A duration as OpenAI's headers have it: `6m0s`, `8.64s`, `17ms`."""
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


def _remaining(standing: Standing, reserved: bool) -> int:
    own = standing.claim.hold + standing.claim.count if reserved else 0
    return max(0, standing.claim.meter.limit - standing.used - standing.held - own)


def _reset_ms(standing: Standing, reserved: bool) -> int:
    """Until the whole limit is free again. A request that was let in has just used some of it."""
    return standing.claim.meter.longest_ms if reserved else standing.unused_in_ms


def _amount(limit: Limit, amount: int) -> str:
    return f"{Decimal(amount) / MICROS:f}" if limit.name == "money_per_month" else str(amount)
