"""What this worker tells of each sequence it ran, under vLLM's names and labels. vLLM's request is our sequence."""

from collections.abc import Callable
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from services.common.weighted_histogram import WeightedHistogram
from services.worker.engine.sequence import Sequence
from services.worker.run_times import RunTimes

FinishedReason = Literal["stop", "length", "abort", "error"]

_LABELS = {"model_name": "", "engine": "0"}
# vLLM's own bounds, so that what its boards and alerts say of them stays true.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_GAP_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20)


class RequestMetrics:
    """Registered once per process. Per token it costs one comparison, in `Executions`; the rest is per sequence."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        labels = {**_LABELS, "model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Callable[[float], None]:
            metric = Histogram(name, text, list(labels), registry=registry, buckets=buckets)
            return metric.labels(*labels.values()).observe

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a sequence's arrival here to its first token, s.", _FIRST_TOKEN_S
        )
        gaps = WeightedHistogram(
            "vllm:inter_token_latency_seconds",
            "Between two steps with tokens of a sequence, s.",
            list(labels),
            registry=registry,
            buckets=_TOKEN_GAP_S,
        )
        self.gap = gaps.labels(*labels.values()).observe
        """(Seconds, sequences): from the step with their last tokens to the one with their next."""
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a sequence, s.", _TOKEN_GAP_S
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From a sequence's arrival here to its last token, s.", _REQUEST_S
        )
        self._queue = histogram(
            "vllm:request_queue_time_seconds",
            "From a sequence's arrival here to its place in the batch, KV from elsewhere included, s.",
            _REQUEST_S,
        )
        self._inference = histogram(
            "vllm:request_inference_time_seconds", "From its place in the batch to its last token, s.", _REQUEST_S
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "From its place in the batch to its first token, s.", _REQUEST_S
        )
        self._decode = histogram("vllm:request_decode_time_seconds", "From its first token to its last, s.", _REQUEST_S)
        self._prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a finished sequence.", _TOKENS)
        self._generation_tokens = histogram(
            "vllm:request_generation_tokens", "Tokens produced here for a finished sequence.", _TOKENS
        )
        self._max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of a sequence.", _TOKENS)
        self.choices = histogram("vllm:request_params_n", "Choices of a request.", _CHOICES)
        ended = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason: stop, length, abort (nobody wanted it any more), error.",
            [*labels, "finished_reason"],
            registry=registry,
        )
        self._ended = {
            reason: ended.labels(*labels.values(), reason) for reason in ("stop", "length", "abort", "error")
        }

    def ended(self, reason: FinishedReason) -> None:
        self._ended[reason].inc()

    def began(self, times: RunTimes) -> None:
        """Its first token was handed out."""
        self._first_token(times.begun - times.arrived)
        self._queue(times.fetch_s + times.queue_s)
        self._prefill(times.prefill_s)

    def finished(self, sequence: Sequence, times: RunTimes) -> None:
        """Its last token was handed out."""
        self._whole(times.ended - times.arrived)
        self._inference(times.prefill_s + times.decode_s)
        self._decode(times.decode_s)
        produced = sequence.output_length - sequence.delivered
        if produced > 1:
            self._per_token(times.decode_s / (produced - 1))
        self._prompt_tokens(sequence.prompt_length)
        self._generation_tokens(produced)
        self._max_tokens(sequence.stop.max_tokens)
