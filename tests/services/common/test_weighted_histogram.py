from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.common.metrics_switch import NoMetrics
from services.common.weighted_histogram import WeightedHistogram

BUCKETS = (0.01, 0.5, 1)


def test_it_says_what_prometheus_own_histogram_would() -> None:
    own, weighted = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("h", "A histogram.", ["model"], registry=own, buckets=BUCKETS)
    histogram = WeightedHistogram("h", "A histogram.", ["model"], registry=weighted, buckets=BUCKETS)
    for model, value, count in (("m", 0.25, 3), ("n", 0.5, 1), ("m", 0.0, 2), ("m", 7.0, 1)):
        histogram.labels(model).observe(value, count)
        for _ in range(count):
            plain.labels(model).observe(value)
    expected = [line for line in generate_latest(own).decode().splitlines() if "_created" not in line]
    assert generate_latest(weighted).decode().splitlines() == expected


def test_it_counts_nothing_where_metrics_are_off() -> None:
    registry = NoMetrics()
    WeightedHistogram("h", "A histogram.", ["model"], registry=registry, buckets=BUCKETS).labels("m").observe(1.0, 2)
    assert generate_latest(registry) == b""
