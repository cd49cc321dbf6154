from prometheus_client import CollectorRegistry, Histogram, generate_latest

from services.worker.weighted_histogram import WeightedHistogram

BUCKETS = (0.01, 0.5, 1)


def test_it_says_what_prometheus_own_histogram_would() -> None:
    own, weighted = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("h", "A histogram.", ["model"], registry=own, buckets=BUCKETS).labels("m")
    histogram = WeightedHistogram("h", "A histogram.", {"model": "m"}, BUCKETS, weighted)
    for value, count in ((0.25, 3), (0.5, 1), (0.0, 2), (7.0, 1)):
        histogram.observe(value, count)
        for _ in range(count):
            plain.observe(value)
    expected = [line for line in generate_latest(own).decode().splitlines() if "_created" not in line]
    assert generate_latest(weighted).decode().splitlines() == expected
