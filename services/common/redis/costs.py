"""What machines spent on requests, per day, API key and model, as any number of gateways add it up.

Sums are of whole numbers and exact. A batch of additions is written once, however often it is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from urllib.parse import quote, unquote

from services.common.machine_costs import COST_FIELDS, MachineCosts
from services.common.redis import scripts
from services.common.redis.client import Argument, RedisClient
from services.common.redis.keys import costs_of_day


@dataclass(frozen=True, slots=True)
class CostKey:
    """Whose costs they are. `key_id` is empty for callers without an API key."""

    key_id: str
    model: str


class CostStore:
    """The costs of all days that are kept. All raise Unavailable when Redis does not answer."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def add(
        self, day: date, costs: Mapping[CostKey, MachineCosts], *, writer: str, batch: int, keep_days: int
    ) -> None:
        """Adds to a day. `writer` counts its batches of a day from 1 and sends no next one before this one is answered;
        a batch that has been added changes nothing.
        """
        forgotten = datetime.combine(day + timedelta(days=keep_days), time(), UTC)
        arguments: list[Argument] = [writer, batch, int(forgotten.timestamp())]
        for key, sums in costs.items():
            prefix = f"{quote(key.key_id, safe=':')} {quote(key.model, safe='/:')}"
            for name in COST_FIELDS:
                if amount := getattr(sums, name):
                    arguments += (f"{prefix} {name}", amount)
        await self._redis.script(scripts.COSTS_ADD, [costs_of_day(day)], arguments)

    async def of_day(self, day: date) -> dict[CostKey, MachineCosts]:
        """What was added to a day."""
        fields: Mapping[bytes, bytes] = await self._redis.command("HGETALL", costs_of_day(day))
        costs: dict[CostKey, MachineCosts] = {}
        for field, amount in _pairs(fields):
            key_id, model, name = field.split(" ") if " " in field else ("", "", "")
            if name in COST_FIELDS:
                sums = costs.setdefault(CostKey(unquote(key_id), unquote(model)), MachineCosts())
                setattr(sums, name, amount)
        return costs


def _pairs(fields: Mapping[bytes, bytes]) -> list[tuple[str, int]]:
    return [(field.decode(), int(amount)) for field, amount in fields.items()]
