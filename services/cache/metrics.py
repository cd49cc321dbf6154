"""Metrics of the cache service."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.cache.index import BlockIndex


class CacheMetrics:
    """All metrics of this service, registered once per process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.blocks = Gauge(
            "headrace_cache_blocks", "Distinct blocks that some holder has.", ["kv_format"], registry=registry
        )
        self.holders = Gauge(
            "headrace_cache_holders",
            "Workers that report the blocks they hold, and this service, once per KV format that it keeps blocks of.",
            registry=registry,
        )
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

        self._define_store(registry)
        self._shown_formats: set[str] = set()

    def _define_store(self, registry: CollectorRegistry) -> None:
        """What concerns the bytes of blocks kept here. A tier is `ram` or `disk`."""
        self.stored_bytes = Gauge(
            "headrace_cache_stored_bytes", "Bytes of its limit that a tier has in use.", ["tier"], registry=registry
        )
        self.stored_blocks = Gauge(
            "headrace_cache_stored_blocks", "Blocks that a tier holds.", ["tier"], registry=registry
        )
        for tier in ("ram", "disk"):
            self.stored_bytes.labels(tier)
            self.stored_blocks.labels(tier)
        self.disk_queue_bytes = Gauge(
            "headrace_cache_disk_queue_bytes", "Bytes of blocks that wait to be written to disk.", registry=registry
        )
        self.hits = Counter(
            "headrace_cache_hits", "Blocks asked for that were kept here, by tier.", ["tier"], registry=registry
        )
        for tier in ("ram", "disk"):
            self.hits.labels(tier)  # there from the start, so that the first one is seen as an increase
        self.misses = Counter(
            "headrace_cache_misses", "Blocks asked for that were not kept here; each ends a fetch.", registry=registry
        )
        self.evictions = Counter(
            "headrace_cache_evictions", "Blocks that went for others, by tier.", ["tier"], registry=registry
        )
        self.dropped = Counter(
            "headrace_cache_dropped",
            "Blocks that did not get to the disk (queue_full) or whose file was bad, by reason.",
            ["reason"],
            registry=registry,
        )
        self.disk_faults = Counter(
            "headrace_cache_disk_faults",
            "Calls that the disk refused: open_failed, write_failed, remove_failed.",
            ["kind"],
            registry=registry,
        )
        self.refused = Counter(
            "headrace_cache_refused",
            "Blocks sent that were not what they said, by reason.",
            ["reason"],
            registry=registry,
        )
        self.received_bytes = Counter(
            "headrace_cache_received_bytes", "Bytes of blocks received to be kept.", registry=registry
        )
        self.sent_bytes = Counter("headrace_cache_sent_bytes", "Bytes of blocks sent.", registry=registry)

    def show(self, index: BlockIndex) -> None:
        """Takes over the sizes of the index after a change."""
        self.holders.set(index.holder_count)
        counts = index.block_counts()
        for kv_format in self._shown_formats - counts.keys():
            self.blocks.remove(kv_format)
        for kv_format, count in counts.items():
            self.blocks.labels(kv_format).set(count)
        self._shown_formats = set(counts)
