"""What this gateway holds at the moment of a scrape."""

from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from services.common.api_keys import MICROS
from services.gateway.active_request import ActiveRequests
from services.gateway.answers.leases import Leases
from services.gateway.keys.limits import KeyLimits

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "money_per_month")


def show_state(registry: CollectorRegistry, active: ActiveRequests, leases: Leases, limits: KeyLimits) -> None:
    """Registers gauges that look when they are asked; all on the event loop, like everything they look at."""
    held = Gauge(
        "headrace_leases",
        "Queue entries of unfinished requests: owned (this gateway renews the lease), waiting (in the queue).",
        ["state"],
        registry=registry,
    )
    held.labels("owned").set_function(lambda: sum(one.owns_entry for one in active))
    held.labels("waiting").set_function(lambda: sum(bool(one.entry_id) and not one.owns_entry for one in active))
    Gauge(
        "headrace_redis_reachable", "1 while leases can be renewed and requests accepted, else 0.", registry=registry
    ).set_function(lambda: leases.problem is None)
    Gauge(
        "headrace_budget_reservations",
        "Requests with something reserved of a key's limits that is not settled yet, ended ones included.",
        registry=registry,
    ).set_function(lambda: limits.reservations)
    reserved = Gauge(
        "headrace_budget_reserved",
        "What these requests hold, by limit: requests, tokens, or money in the currency of the prices.",
        ["limit"],
        registry=registry,
    )
    for name in _LIMITS:
        reserved.labels(name).set_function(partial(_reserved, limits, name))


def _reserved(limits: KeyLimits, name: str) -> float:
    amount = limits.reserved(name)
    return amount / MICROS if name == "money_per_month" else amount
