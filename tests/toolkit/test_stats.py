import pytest

from headrace.v1.inference_pb2 import InferenceMetrics, WindowMetrics
from services.common.latency_sketch import LatencySketch, bin_of
from toolkit.stats import NoStats, gather_stats, merge


def report(model: str, requests: int, seconds: float) -> InferenceMetrics:
    sketch = LatencySketch()
    sketch.add({bin_of(seconds): requests})
    window = WindowMetrics(
        model=model,
        window="1m",
        seconds=60,
        requests=requests,
        tokens=60 * requests,
        tokens_per_s=requests,
        end_to_end_s=sketch.to_proto(whole=True),
    )
    return InferenceMetrics(relative_error=0.01, windows=[window])


def test_gateways_are_merged_by_model_and_window() -> None:
    merged = merge([report("m", 99, 1.0), report("m", 1, 8.0), report("other", 1, 2.0)])
    one, other = merged.windows
    assert (one.model, other.model) == ("m", "other")
    assert (one.requests, one.tokens, one.tokens_per_s, one.seconds) == (100, 6000, 100, 60)
    assert one.end_to_end_s.count == 100
    assert one.end_to_end_s.mean == pytest.approx(1.07, rel=0.001)
    assert (one.end_to_end_s.p50, one.end_to_end_s.p99) == pytest.approx((1.0, 1.0), rel=0.01)
    assert other.end_to_end_s.p99 == pytest.approx(2.0, rel=0.01)
    assert merge([]).windows == []


async def test_a_gateway_that_does_not_answer_is_named() -> None:
    with pytest.raises(NoStats, match=r"127\.0\.0\.1:1 does not answer"):
        await gather_stats(["127.0.0.1:1"], None)
