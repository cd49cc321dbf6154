"""Whether a service's metrics count: `HEADRACE_METRICS`.

Who makes metrics takes a registry and knows nothing of this: what is registered with `NoMetrics` counts nothing.
"""

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector

from services.common.config import CommonSettings

METRICS_ARE_OFF = "This service counts nothing: HEADRACE_METRICS is false."


class NoMetrics(CollectorRegistry):
    """A registry that has nothing to show."""

    def register(self, collector: Collector) -> None:
        """From now on nothing that is told to it, with or without labels, is kept."""
        collector.__dict__.update(dict.fromkeys(("inc", "dec", "set", "set_function", "observe", "remove"), _nothing))
        collector.__dict__["labels"] = lambda *_, **__: collector


def registry_of(settings: CommonSettings) -> CollectorRegistry:
    """What this process's metrics are registered with."""
    return REGISTRY if settings.metrics else NoMetrics()


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a count."""
