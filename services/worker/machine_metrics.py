"""Metrics of what the machine's time goes to and of what an hour of it costs: see docs/costs.md."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.engine_loop import EngineLoop


def register_machine_metrics(
    model_name: str, engine: EngineLoop, price_per_hour: float | None, registry: CollectorRegistry
) -> None:
    """Makes them known, once per process."""
    registry.register(_WorkerSeconds(model_name, engine))
    if price_per_hour is not None:
        gauge = Gauge(
            "headrace_worker_price_per_hour", "What an hour of this worker costs.", ["model_name"], registry=registry
        )
        gauge.labels(model_name).set(price_per_hour)


class _WorkerSeconds(Collector):
    """Read when they are asked for: idle time passes without an event."""

    def __init__(self, model_name: str, engine: EngineLoop) -> None:
        self._model_name = model_name
        self._engine = engine
        self._idle = 0.0

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family, counters = self._family(), self._engine.counters
        self._idle = max(self._idle, self._engine.idle_seconds)  # read beside a running thread: never back
        seconds = {
            "prefill": counters.prefill_ns / 1e9,
            "decode": counters.decode_ns / 1e9,
            "failed": counters.failed_ns / 1e9,
            "idle": self._idle,
        }
        for use, value in seconds.items():
            family.add_metric([self._model_name, use], value)
        return [family]

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(
            "headrace_worker_seconds",
            "Time since the engine started, by what it went to: prefill, decode, failed (steps) or idle, s.",
            labels=["model_name", "use"],
        )
