"""Metrics of what requests cost. Per model alone: keys have no bound."""

from prometheus_client import CollectorRegistry, Counter

from services.common.machine_costs import NANOS, MachineCosts


class CostMetrics:
    """Registered once per gateway. Observed once per request."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "phase")
        self._seconds = Counter(
            "headrace_machine_seconds",
            "Time of engines that requests took, by phase, s.",
            labels,
            registry=registry,
        )
        self._cost = Counter(
            "headrace_cost", "What that time cost at the workers' prices, in their unit.", labels, registry=registry
        )
        self._saved = Counter(
            "headrace_cost_saved",
            "What requests would have cost beside that, by what saved it: prefix (cached prompt tokens).",
            ("model", "reason"),
            registry=registry,
        )

    def observe(self, model: str, costs: MachineCosts) -> None:
        """Takes over a request that has ended."""
        self._seconds.labels(model, "prefill").inc(costs.prefill_ns / NANOS)
        self._seconds.labels(model, "decode").inc(costs.decode_ns / NANOS)
        self._cost.labels(model, "prefill").inc(costs.prefill_nanos / NANOS)
        self._cost.labels(model, "decode").inc(costs.decode_nanos / NANOS)
        self._saved.labels(model, "prefix").inc(costs.saved_prefix_nanos / NANOS)
