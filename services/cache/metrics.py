"""Metrics of the cache service."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.cache.index import BlockIndex


class CacheMetrics:
    """All metrics of this service, registered once per process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.blocks = Gauge(
            "headrace_cache_blocks", "Distinct blocks that some worker holds.", ["kv_format"], registry=registry
        )
        self.holders = Gauge("headrace_cache_holders", "Workers that report the blocks they hold.", registry=registry)
        self.watchers = Gauge("headrace_cache_watchers", "Schedulers that follow the index.", registry=registry)
        self.events = Counter(
            "headrace_cache_events", "Blocks that workers reported, by kind.", ["kind"], registry=registry
        )
        self.snapshots = Counter(
            "headrace_cache_snapshots", "Snapshots that workers began to report.", registry=registry
        )
        self.gaps = Counter(
            "headrace_cache_gaps", "Times that events were missing and a snapshot was asked for.", registry=registry
        )
        self.watchers_cut = Counter(
            "headrace_cache_watchers_cut", "Watch streams ended because they fell behind.", registry=registry
        )
        self.lookups = Counter("headrace_cache_lookups", "Prefix lookups.", registry=registry)
        self.lookup_hits = Counter(
            "headrace_cache_lookup_hits", "Prefix lookups that found at least one block.", registry=registry
        )

        self._shown_formats: set[str] = set()

    def show(self, index: BlockIndex) -> None:
        """Takes over the sizes of the index after a change."""
        self.holders.set(index.holder_count)
        counts = index.block_counts()
        for kv_format in self._shown_formats - counts.keys():
            self.blocks.remove(kv_format)
        for kv_format, count in counts.items():
            self.blocks.labels(kv_format).set(count)
        self._shown_formats = set(counts)
