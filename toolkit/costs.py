"""What machines spent on requests, as Redis keeps it: read day by day, and added up as a person wants to see it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import date, timedelta
from typing import Literal

from services.common.machine_costs import NANOS, MachineCosts
from services.common.redis.costs import CostKey, CostStore

By = Literal["key", "model", "day"]
Rows = dict[str, MachineCosts]

NO_KEY = "(no key)"
_LONGEST_DAYS = 3660


class BadSince(Exception):
    """One sentence for the person who named a day."""


def first_day(since: str, today: date) -> date:
    """The day that `7d` (today and the six days before it) or `2026-01-31` stands for. Raises BadSince."""
    if (days := re.fullmatch(r"([1-9][0-9]{0,4})d", since)) is not None:
        first = today - timedelta(days=int(days[1]) - 1)
    else:
        try:
            first = date.fromisoformat(since)
        except ValueError:
            raise BadSince(
                f"--since is a number of days such as 7d, or a day such as {today}, not {since!r}."
            ) from None
    if not 0 <= (today - first).days < _LONGEST_DAYS:
        raise BadSince(f"--since is a day up to today and not more than {_LONGEST_DAYS} days ago, not {since!r}.")
    return first


async def read_costs(store: CostStore, by: By, first: date, last: date) -> Rows:
    """The sums of all requests that ended from one day to another, both included, in the order of their names."""
    name_of: Mapping[By, Callable[[date, CostKey], str]] = {
        "key": lambda day, key: key.key_id or NO_KEY,
        "model": lambda day, key: key.model,
        "day": lambda day, key: day.isoformat(),
    }
    rows: Rows = {}
    for offset in range((last - first).days + 1):
        day = first + timedelta(days=offset)
        for key, costs in (await store.of_day(day)).items():
            rows.setdefault(name_of[by](day, key), MachineCosts()).add(costs)
    return dict(sorted(rows.items()))


def total(rows: Rows) -> MachineCosts:
    whole = MachineCosts()
    for costs in rows.values():
        whole.add(costs)
    return whole


def per_thousand_tokens(costs: MachineCosts) -> float:
    """Money per 1,000 tokens, prompt and output together; 0 without any."""
    tokens = costs.prompt_tokens + costs.completion_tokens
    return costs.nanos / NANOS * 1000 / tokens if tokens else 0.0


def as_json(costs: MachineCosts) -> dict[str, float]:
    """The whole numbers as they are kept, and what they come to."""
    return {
        **asdict(costs),
        "cost": costs.nanos / NANOS,
        "saved_by_prefix": costs.saved_prefix_nanos / NANOS,
        "cost_per_1000_tokens": per_thousand_tokens(costs),
    }
