"""Metrics of the worker service: vLLM's names where vLLM has one, so that its dashboards show this engine too."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from services.worker.engine.counters import EngineCounters
from services.worker.engine_loop import Turn

_LABELS = ["model_name", "engine"]
_ENGINE = "0"
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_SECOND_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class WorkerMetrics:
    """All metrics of this service, registered once per process."""

    def __init__(self, model_name: str, kv_usage: Callable[[], float], registry: CollectorRegistry = REGISTRY) -> None:
        """`kv_usage` gives the part of the KV blocks that is in use at this moment."""
        self._seen = EngineCounters()
        self._running = self._waiting = 0

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, _LABELS, registry=registry).labels(model_name, _ENGINE).set_function(value)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, _LABELS, registry=registry).labels(model_name, _ENGINE)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, registry=registry, buckets=buckets).labels(model_name, _ENGINE)

        gauge("vllm:num_requests_running", "Sequences in the running batch.", lambda: self._running)
        gauge(
            "vllm:num_requests_waiting",
            "Sequences taken on that wait for a place in the batch.",
            lambda: self._waiting,
        )
        gauge(
            "vllm:kv_cache_usage_perc",
            "Part of the KV blocks in use, from 0 to 1.",
            kv_usage,
        )
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens produced.")
        self._prefix_queries = counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the block pool.")
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Prompt tokens found in the block pool.")
        self._draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Tokens computed in advance, as drafts.")
        self._accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Drafts that were right.")
        self._preemptions = counter("vllm:num_preemptions", "Times that a sequence lost its blocks to an older one.")
        self._iteration_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", _TOKEN_BUCKETS)
        self._step_seconds = histogram("headrace_engine_step_seconds", "Duration of a step, s.", _SECOND_BUCKETS)
        self._failed = counter("headrace_engine_failed_sequences", "Sequences that the engine gave up.")

    def observe(self, turn: Turn) -> None:
        """Takes over what one turn of the engine did. Called after every step: most of them are decodes alone."""
        status, counters, seen = turn.status, turn.status.counters, self._seen
        self._running, self._waiting = status.running, status.waiting
        if counters.prefill_tokens > seen.prefill_tokens:
            self._prompt_tokens.inc(counters.prefill_tokens - seen.prefill_tokens)
        if counters.prefix_queried_tokens > seen.prefix_queried_tokens:
            self._prefix_queries.inc(counters.prefix_queried_tokens - seen.prefix_queried_tokens)
            self._prefix_hits.inc(counters.prefix_hit_tokens - seen.prefix_hit_tokens)
        if counters.draft_tokens > seen.draft_tokens:
            self._draft_tokens.inc(counters.draft_tokens - seen.draft_tokens)
            self._accepted_tokens.inc(counters.accepted_tokens - seen.accepted_tokens)
        if counters.preemptions > seen.preemptions:
            self._preemptions.inc(counters.preemptions - seen.preemptions)
        self._seen = counters
        if turn.result is not None and turn.result.computed_tokens:
            self._generation_tokens.inc(len(turn.result.tokens))
            self._iteration_tokens.observe(turn.result.computed_tokens)
            self._step_seconds.observe(turn.step_seconds)
        if turn.failed:
            self._failed.inc(len(turn.failed))
