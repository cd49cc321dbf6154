"""Metrics of the scheduler."""

from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from services.scheduler.placement import Reason

_WAIT_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class SchedulerMetrics:
    """All metrics of this service, registered once per process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.queue_depth = Gauge(
            "headrace_queue_depth",
            "Jobs in Redis that no gateway runs yet; every scheduler replica sees the same.",
            ["model", "priority"],
            registry=registry,
        )
        self.queue_age = Gauge(
            "headrace_queue_age_seconds",
            "Age of the oldest job in Redis that no gateway runs yet, s; 0: there is none.",
            ["model", "priority"],
            registry=registry,
        )
        self.queue_wait = Histogram(
            "headrace_queue_wait_seconds",
            "Seconds from a job's entry in the queue to the offer that its gateway accepted.",
            ["model"],
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        self.placements = Counter(
            "headrace_placements",
            "Placements offered, by reason: prefix_hit, fetch or prefill (KV from another process), least_loaded, or "
            "replaced (a running request placed again).",
            ["model", "reason"],
            registry=registry,
        )
        self.workers = Gauge(
            "headrace_workers",
            "Connected workers by state: healthy, draining, drained, silent, breaker_open or breaker_half_open.",
            ["model", "state"],
            registry=registry,
        )
        self.offers = Counter(
            "headrace_offers", "Offers by answer: accepted, running, gone or none.", ["answer"], registry=registry
        )
        self.gateway_lost = Counter(
            "headrace_gateway_lost", "Jobs closed because their gateway is gone.", registry=registry
        )
        self.orphans = Counter(
            "headrace_orphans",
            "Jobs of lost gateways offered to others for adoption; one that is not taken up is offered again.",
            registry=registry,
        )
        self.refusals = Counter(
            "headrace_placement_refusals", "Requests told that no worker can run them.", registry=registry
        )
        self.index_blocks = Gauge(
            "headrace_index_blocks", "Distinct blocks known to be held by some worker.", registry=registry
        )
        self.held_jobs = Gauge(
            "headrace_scheduler_held_jobs",
            "Jobs taken from Redis that wait here for a placement or an answer.",
            ["model"],
            registry=registry,
        )


class RequestMetrics:
    """Those of one model that each request counts in, their labels looked up once."""

    def __init__(self, metrics: SchedulerMetrics, model: str) -> None:
        self.queue_wait = metrics.queue_wait.labels(model)
        self.accepted = metrics.offers.labels("accepted")
        self.replaced = metrics.placements.labels(model, "replaced")
        self.placed = {reason: metrics.placements.labels(model, reason) for reason in get_args(Reason)}
