"""Metrics of what this gateway's requests hold in Redis, counted when they are asked for."""

from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from services.gateway.active_request import ActiveRequests
from services.gateway.keys.limits import KeyLimits


def show_held(active: ActiveRequests, limits: KeyLimits, registry: CollectorRegistry) -> None:
    """Registers `headrace_leases` and `headrace_reservations`."""
    leases = Gauge("headrace_leases", "Queue entries whose lease this gateway renews.", registry=registry)
    leases.set_function(lambda: sum(one.owns_entry for one in active))
    reservations = Gauge(
        "headrace_reservations",
        "Requests that hold a part of their key's limits: running, or unsettled (ended, and not charged yet).",
        ["state"],
        registry=registry,
    )
    reservations.labels("running").set_function(partial(limits.count, ended=False))
    reservations.labels("unsettled").set_function(partial(limits.count, ended=True))
