"""A histogram that takes many equal observations at once, which prometheus-client's does not."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector


class WeightedObservations:
    """The observations under one set of labels. Made from one thread, and read by whoever scrapes."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts a value as if it had been observed so often."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), list(self._counts), strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class WeightedHistogram(Collector):
    """One histogram with labels."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], *, registry: CollectorRegistry, buckets: Sequence[float]
    ) -> None:
        """`buckets`: upper bounds, ascending, without infinity."""
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._bounds = tuple(map(float, buckets))
        self._children: dict[tuple[str, ...], WeightedObservations] = {}
        registry.register(self)

    def labels(self, *values: str) -> WeightedObservations:
        """Where what has these labels is observed."""
        return self._children.setdefault(values, WeightedObservations(self._bounds))

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, observations in list(self._children.items()):
            observations.add_to(family, values)
        yield family
