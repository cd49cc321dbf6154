"""What machines spent on requests, and what that cost. Pure, and exact: time is in whole nanoseconds, money in whole
billionths of the unit that workers' prices are in, rounded once per sequence and kind.

This is what serving costs whoever runs the machines, not what callers are charged.
"""

from dataclasses import dataclass, fields

NANOS = 1_000_000_000
_HOUR_S = 3600


@dataclass(slots=True)
class MachineCosts:
    """Of one request or of many. All only grow."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_nanos: int = 0
    decode_nanos: int = 0
    # What the cached tokens would have cost.
    saved_prefix_nanos: int = 0

    @property
    def nanos(self) -> int:
        """The cost."""
        return self.prefill_nanos + self.decode_nanos

    def spend(self, prefill_ns: int, decode_ns: int, price_per_hour: float, saved_prefix_ns: int = 0) -> None:
        """Adds time of a worker at its price."""
        self.prefill_ns += prefill_ns
        self.decode_ns += decode_ns
        self.prefill_nanos += price_of(prefill_ns, price_per_hour)
        self.decode_nanos += price_of(decode_ns, price_per_hour)
        self.saved_prefix_nanos += price_of(saved_prefix_ns, price_per_hour)

    def add(self, other: "MachineCosts") -> None:
        for name in COST_FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COST_FIELDS = tuple(field.name for field in fields(MachineCosts))


def price_of(time_ns: int, price_per_hour: float) -> int:
    """What a worker costs for that long, in billionths."""
    return round(time_ns * price_per_hour / _HOUR_S)
