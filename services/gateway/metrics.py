"""All metrics of the gateway. Label values are bounded: model names come from the catalog, never from a caller."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common.errors import DeadlineExceeded, Overloaded, Unavailable
from services.common.weighted_histogram import WeightedHistogram
from services.gateway.stats import Counted, Exemplar, InferenceStats, Observed, ObservedOften, Recorders
from services.gateway.time_budget import PHASES, TimeBudget

_PHASE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SHED_REASONS = ("queue_full", "overloaded", "rate_limit", "quota", "deadline", "unavailable")
_TOKEN_GAP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """The gateway's metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter, model = partial(Counter, registry=registry), ("model",)
        self.requests = counter(
            "llm_requests",
            "Requests ended, by outcome: success, error, cancelled, refused (never accepted), handed_over.",
            ("model", "status"),
        )
        self.tokens = counter("llm_tokens_generated", "Output tokens delivered.", model)
        self.prompt_tokens = counter("llm_prompt_tokens", "Prompt tokens of started requests.", model)
        self.cached_prompt_tokens = counter("llm_cached_prompt_tokens", "Prompt tokens whose KV was found.", model)
        self.active = Gauge(
            "llm_active_requests", "Requests accepted and not ended, queued ones included.", model, registry=registry
        )
        self.resumes = counter(
            "headrace_resumes",
            "Times a request was placed again, by reason: busy, draining, lost, stalled or failed.",
            ("model", "reason"),
        )
        self.http_requests = counter("headrace_http_requests", "HTTP requests answered.", ("route", "status"))
        self.adoptions = counter("headrace_adoptions", "Requests of dead gateways that go on here.")
        self.answers_resumed = counter("headrace_answers_resumed", "Recorded answers that a caller came back for.")
        self.answers_attached = counter(
            "headrace_answers_attached", "Requests answered from an earlier one's idempotency key."
        )
        shed = counter(
            "headrace_shed",
            "Requests that ended in an error after which to come again, by reason: queue_full, overloaded, rate_limit, "
            "quota, deadline or unavailable.",
            ("reason",),
        )
        self._shed = {reason: shed.labels(reason) for reason in _SHED_REASONS}
        self._add_times(partial(Histogram, registry=registry))
        self._models: dict[str, ModelMetrics] = {}
        self.stats = InferenceStats()

    def _add_times(self, histogram: Callable[..., Histogram]) -> None:
        self.latency = histogram(
            "llm_latency_seconds",
            "Seconds of a finished request: total, and each part of its time budget, which add up to it.",
            ("model", "phase"),
            buckets=(*_PHASE_SECONDS, *_SECONDS),
        )
        self.time_to_first_token = histogram(
            "headrace_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            ("model",),
            buckets=_SECONDS,
        )
        self.inter_token_latency = WeightedHistogram(
            "headrace_inter_token_latency_seconds",
            "Seconds between two tokens of one choice.",
            ("model",),
            registry=self.registry,
            buckets=_TOKEN_GAP_SECONDS,
        )
        self.queue_time = histogram(
            "headrace_queue_seconds",
            "Seconds from a request's arrival to its first worker.",
            ("model",),
            buckets=_SECONDS,
        )

    @contextlib.contextmanager
    def counting_shed(self) -> Iterator[None]:
        """Around the work on a request."""
        try:
            yield
        except (Overloaded, Unavailable, DeadlineExceeded) as error:
            self._shed[error.reason].inc()
            raise

    def for_model(self, model: str) -> "ModelMetrics":
        """The metrics of a model of the catalog."""
        if model not in self._models:
            self._models[model] = bound = ModelMetrics(self, model)
            self.stats.follow(model, bound.recorders)
        return self._models[model]


class ModelMetrics:
    """The metrics of one model, bound once, so that the token path looks no label up."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.succeeded = Counted(metrics.requests.labels(model, "success").inc)
        self.errored = Counted(metrics.requests.labels(model, "error").inc)
        self.cancelled = metrics.requests.labels(model, "cancelled")
        self.handed_over = metrics.requests.labels(model, "handed_over")
        self.refused = metrics.requests.labels(model, "refused")
        self._total = Observed(metrics.latency.labels(model, "total").observe)
        self._phases = [(phase, metrics.latency.labels(model, phase)) for phase in PHASES]
        self.tokens = Counted(metrics.tokens.labels(model).inc)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_prompt_tokens = metrics.cached_prompt_tokens.labels(model)
        self.active = metrics.active.labels(model)
        self.time_to_first_token = Observed(metrics.time_to_first_token.labels(model).observe)
        self.inter_token_latency = ObservedOften(metrics.inter_token_latency.labels(model).observe)
        self.queue_time = metrics.queue_time.labels(model)
        self.resumes = {
            reason: metrics.resumes.labels(model, reason)
            for reason in ("busy", "draining", "lost", "stalled", "failed")
        }
        self.recorders = Recorders(
            self.succeeded,
            self.errored,
            self.tokens,
            self.time_to_first_token,
            self.inter_token_latency,
            self._total,
        )

    def spent(self, budget: TimeBudget, exemplar: Exemplar) -> None:
        """A request has finished, in that time. Only traces that are recorded make exemplars."""
        self._total.observe(budget.total / 1e6, exemplar)
        for phase, histogram in self._phases:
            histogram.observe(budget.parts[phase] / 1e6, exemplar)
