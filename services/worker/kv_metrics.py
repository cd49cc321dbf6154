"""Metrics of KV that moves between this worker and others."""

from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

_SECOND_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Moved:
    """Blocks that came from others or went to them, and how long requests waited for those that came."""

    blocks: int = 0
    size: int = 0
    seconds: float = 0.0


class KvMetrics:
    """Registered once per process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.moved = Moved()
        self._exported_blocks = Counter("headrace_kv_exported_blocks", "Blocks handed to others.", registry=registry)
        self._exported_bytes = Counter("headrace_kv_exported_bytes", "Bytes of these blocks.", registry=registry)
        self._imported_blocks = Counter(
            "headrace_kv_imported_blocks", "Blocks that came from others, by source.", ["source"], registry=registry
        )
        self._imported_bytes = Counter(
            "headrace_kv_imported_bytes", "Bytes of these blocks.", ["source"], registry=registry
        )
        self._failures = Counter(
            "headrace_kv_import_failures",
            "Times that a source did not give what it was asked for, so that the rest was computed, by reason.",
            ["source", "reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "headrace_kv_import_seconds",
            "Time from asking a source to its last block, s.",
            ["source"],
            registry=registry,
            buckets=_SECOND_BUCKETS,
        )
        for source in ("worker", "cache", "prefill"):  # there from the start: a first one is seen as an increase
            for metric in (self._imported_blocks, self._imported_bytes, self._seconds):
                metric.labels(source)

        self._offloaded_blocks = Counter(
            "headrace_kv_offloaded_blocks", "Blocks given to a cache service to keep.", registry=registry
        )
        self._offloaded_bytes = Counter("headrace_kv_offloaded_bytes", "Bytes of these blocks.", registry=registry)
        self._offload_failures = Counter(
            "headrace_kv_offload_failures", "Times that a cache service kept nothing.", ["reason"], registry=registry
        )

    def exported(self, size: int, blocks: int) -> None:
        self._add(blocks, size, 0.0)
        self._exported_blocks.inc(blocks)
        self._exported_bytes.inc(size)

    def imported(self, source: str, blocks: int, size: int, seconds: float) -> None:
        self._add(blocks, size, seconds)
        self._imported_blocks.labels(source).inc(blocks)
        self._imported_bytes.labels(source).inc(size)
        self._seconds.labels(source).observe(seconds)

    def offloaded(self, blocks: int, size: int) -> None:
        self._offloaded_blocks.inc(blocks)
        self._offloaded_bytes.inc(size)

    def offload_failed(self, reason: str) -> None:
        self._offload_failures.labels(reason).inc()

    def failed(self, source: str, reason: str) -> None:
        self._failures.labels(source, reason).inc()

    def _add(self, blocks: int, size: int, seconds: float) -> None:
        self.moved.blocks += blocks
        self.moved.size += size
        self.moved.seconds += seconds
