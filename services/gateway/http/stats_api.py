"""GET /v1/stats: the summary of `stats.py` as JSON."""

import msgspec

from headrace.v1.inference_pb2 import Distribution, InferenceMetrics, WindowMetrics


class DistributionObject(msgspec.Struct):
    """Seconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float


class WindowObject(msgspec.Struct):
    model: str
    # 1m, 5m, 1h, or all: since the gateway started.
    window: str
    seconds: float
    requests: int
    failed: int
    tokens: int
    tokens_per_s: float
    time_to_first_token_s: DistributionObject
    inter_token_latency_s: DistributionObject
    end_to_end_s: DistributionObject


class StatsObject(msgspec.Struct):
    # How far a quantile may be off, as a part of the true value.
    relative_error: float
    windows: list[WindowObject]


def stats_object(report: InferenceMetrics) -> StatsObject:
    return StatsObject(report.relative_error, [_window(window) for window in report.windows])


def _window(window: WindowMetrics) -> WindowObject:
    return WindowObject(
        window.model,
        window.window,
        window.seconds,
        window.requests,
        window.failed,
        window.tokens,
        window.tokens_per_s,
        _distribution(window.time_to_first_token_s),
        _distribution(window.inter_token_latency_s),
        _distribution(window.end_to_end_s),
    )


def _distribution(told: Distribution) -> DistributionObject:
    return DistributionObject(told.count, told.mean, told.p50, told.p95, told.p99)
