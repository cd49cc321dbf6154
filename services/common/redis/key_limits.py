"""Which meters the limits of a key and of its group are.

A month is 31 days, so that no month of the calendar exceeds its budget either.
"""

from collections.abc import Mapping

from services.common.api_keys import ApiKey, Limits
from services.common.redis.limits import Meter

_MINUTE_MS = 60_000
_DAY_MS = 24 * 60 * _MINUTE_MS
WINDOWS_MS: Mapping[str, int] = {
    "requests_per_minute": _MINUTE_MS,
    "tokens_per_minute": _MINUTE_MS,
    "concurrent": 0,
    "tokens_per_day": _DAY_MS,
    "money_per_month": 31 * _DAY_MS,
}


def scope_of(key: ApiKey) -> str:
    """The scope of a key's meters: its group's, so that one script sees both."""
    return f"group:{key.group}" if key.group else f"key:{key.id}"


def key_meters(key: ApiKey) -> dict[str, Meter]:
    """The meters of a key's own limits, by their names in `Limits`."""
    return _meters(f"key:{key.id}", key)


def group_meters(limits: Limits) -> dict[str, Meter]:
    """The meters of a group's limits, in the group's scope."""
    return _meters("group", limits)


def _meters(owner: str, limits: Limits) -> dict[str, Meter]:
    return {name: Meter(f"{owner}:{name}", amount, WINDOWS_MS[name]) for name, amount in limits.amounts().items()}
