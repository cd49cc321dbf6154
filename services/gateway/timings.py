"""A request's time budget as callers get it who ask for it with `x-headrace-timings: 1`."""

from headrace.v1.inference_pb2 import Timings
from services.gateway.time_budget import TimeBudget

HEADER = "x-headrace-timings"


def are_wanted(header: str | None) -> bool:
    """By the value of the request's header or metadata."""
    return header == "1"


def timings_header(budget: TimeBudget) -> str:
    """In the syntax of `Server-Timing`, milliseconds: `total;dur=12.345, gateway;dur=0.600, ...`."""
    return ", ".join(f"{name};dur={us / 1000:.3f}" for name, us in _named(budget))


def timings_object(budget: TimeBudget) -> dict[str, float]:
    """Milliseconds by `total_ms`, `gateway_ms` and so on."""
    return {f"{name}_ms": us / 1000 for name, us in _named(budget)}


def timings_message(budget: TimeBudget) -> Timings:
    return Timings(**{f"{name}_us": us for name, us in _named(budget)})


def _named(budget: TimeBudget) -> list[tuple[str, int]]:
    return [("total", budget.total), *budget.parts.items()]
