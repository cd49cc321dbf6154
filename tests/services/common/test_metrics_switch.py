import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

from services.common.config import CommonSettings, parse
from services.common.metrics_switch import NoMetrics, registry_of


def test_metrics_count_unless_they_are_switched_off() -> None:
    assert registry_of(CommonSettings()) is REGISTRY
    for variable in ("HEADRACE_METRICS", "HEADRACE_GATEWAY_METRICS"):
        assert isinstance(registry_of(parse(CommonSettings, "gateway", {variable: "false"})), NoMetrics)


@pytest.mark.parametrize("labels", [(), ("model",)])
def test_what_is_registered_there_counts_nothing(labels: tuple[str, ...]) -> None:
    registry = NoMetrics()
    counter = Counter("a", "A counter.", labels, registry=registry)
    gauge = Gauge("b", "A gauge.", labels, registry=registry)
    histogram = Histogram("c", "A histogram.", labels, registry=registry)
    observe = histogram.labels("m").observe
    counter.labels("m").inc(2)
    gauge.labels("m").set(3)
    gauge.labels("m").set_function(lambda: 4)
    gauge.remove("m")
    observe(0.5, {"trace_id": "t"})
    samples = [sample for metric in (counter, gauge, histogram) for one in metric.collect() for sample in one.samples]
    assert not any(sample.value for sample in samples if not sample.name.endswith("_created"))
    assert generate_latest(registry) == b""
