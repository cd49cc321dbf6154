import pytest

from headrace.v1.inference_pb2 import GetStatsRequest, WindowMetrics
from services.gateway.stats import Counted, Exemplar, InferenceStats, Observed, Recorders
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.stack import Stack


class Bench:
    """Statistics of one model at times that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stats = InferenceStats(clock=lambda: self.now)
        self.observed: list[float] = []
        self.recorders = Recorders(
            *(Counted(self.observed.append) for _ in range(3)), *(Observed(self._observe) for _ in range(3))
        )
        self.stats.follow("m", self.recorders)

    def _observe(self, seconds: float, exemplar: Exemplar) -> None:
        self.observed.append(seconds)

    def pass_slices(self, count: int) -> None:
        for _ in range(count):
            self.now += 10.0
            self.stats.turn()

    def request(self, tokens: int, seconds: float) -> None:
        self.recorders.succeeded.inc()
        self.recorders.tokens.inc(tokens)
        self.recorders.end_to_end.observe(seconds)

    def windows(self) -> dict[str, WindowMetrics]:
        return {window.window: window for window in self.stats.report().windows}

    def requests(self) -> list[int]:
        windows = self.windows()
        return [windows[name].requests for name in ("1m", "5m", "1h", "all")]


def test_a_request_leaves_one_window_after_the_other() -> None:
    bench = Bench()
    bench.request(7, 2.0)
    assert bench.requests() == [1, 1, 1, 1]
    bench.pass_slices(6)
    assert bench.requests() == [1, 1, 1, 1]
    bench.pass_slices(1)
    assert bench.requests() == [0, 1, 1, 1]
    bench.pass_slices(24)
    assert bench.requests() == [0, 0, 1, 1]
    bench.pass_slices(360 - 31)
    assert bench.requests() == [0, 0, 1, 1]
    bench.pass_slices(6)
    assert bench.requests() == [0, 0, 0, 1]


def test_rates_are_over_the_time_that_a_window_has() -> None:
    bench = Bench()
    bench.now = 4.0
    bench.request(100, 0.5)
    assert bench.windows()["1m"].tokens_per_s == 25.0
    bench.pass_slices(100)
    windows = bench.windows()
    assert [windows[name].seconds for name in ("1m", "5m", "1h", "all")] == [60.0, 300.0, 1004.0, 1004.0]
    assert windows["all"].tokens == 100
    assert windows["all"].end_to_end_s.p99 == pytest.approx(0.5, rel=0.01)


def test_metrics_are_told_what_is_counted() -> None:
    bench = Bench()
    bench.request(7, 2.0)
    assert bench.observed == [1, 7, 2.0]


async def test_a_gateway_tells_its_stats_over_http_and_grpc(stack: Stack) -> None:
    assert (await stack.http.get("/v1/stats")).json()["windows"] == []
    answers = [(await stack.complete()).json() for _ in range(3)]
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    told = (await stack.http.get("/v1/stats")).json()
    assert told["relative_error"] == 0.01
    assert [(one["model"], one["window"]) for one in told["windows"]] == [
        (MODEL, name) for name in ("1m", "5m", "1h", "all")
    ]
    for one in told["windows"]:
        assert (one["requests"], one["failed"], one["tokens"]) == (3, 0, tokens)
        assert one["time_to_first_token_s"]["count"] == one["end_to_end_s"]["count"] == 3
        assert 0 < one["time_to_first_token_s"]["p50"] <= one["end_to_end_s"]["p99"]
        assert one["inter_token_latency_s"]["count"] > 0 < one["tokens_per_s"]
    report = await stack.inference.GetStats(GetStatsRequest())
    assert report.windows[0].requests == 3 and not report.windows[0].end_to_end_s.sketch
    assert stack.sample("llm_requests_total", model=MODEL, status="success") == 3
