"""Composition root of the cache service: `python -m services.cache`."""

import logging

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.cache.config import CacheSettings
from services.cache.disk_tier import DiskTier
from services.cache.index import BlockIndex
from services.cache.metrics import CacheMetrics
from services.cache.own_blocks import OwnBlocks
from services.cache.ram_tier import RamTier
from services.cache.servicer import CacheServicer
from services.cache.store import Store
from services.cache.watch import WatchHub
from services.common import config, mutual_tls, serve, telemetry
from services.common.channel import host_port, reachable
from services.common.kv_wire import with_chunks
from services.common.metrics_switch import registry_of
from services.common.tracing import make_tracer

log = logging.getLogger("services.cache")


async def serve_cache(settings: CacheSettings, stop: serve.Stop) -> None:
    """Runs the service until `stop` is set."""
    metrics = CacheMetrics(registry_of(settings))
    index = BlockIndex()
    hub = WatchHub(index, metrics, settings.watch_backlog_bytes)
    own = OwnBlocks(settings.id, index, hub, metrics)
    disk = None
    if settings.disk_path is not None:
        disk = DiskTier(settings.disk_path, settings.disk_bytes, settings.disk_queue_bytes, metrics)
    store = Store(RamTier(settings.ram_bytes), disk, metrics, own.change)
    await store.open()
    name = cache_pb2.DESCRIPTOR.services_by_name["Cache"].full_name
    tracer = make_tracer("cache", settings)
    servicer = CacheServicer(index, hub, store, own, metrics, tracer, max_block_bytes=settings.max_block_bytes)
    add = with_chunks(cache_pb2_grpc.add_CacheServicer_to_server)
    server = serve.GrpcServer([serve.Registration(add, servicer, name)])
    port = await server.start(host_port(settings.host, settings.port))
    own.announce(settings.advertise_address or await reachable(settings.host, port), store.held)
    metrics_port = telemetry.serve_metrics(settings, settings.metrics_port)
    await server.set_serving(True)
    log.info("ready on %s, id %s, metrics on port %d", host_port(settings.host, port), settings.id, metrics_port)
    await stop.wait()
    await server.set_serving(False)
    # Its streams never end by themselves; workers and schedulers come back to whoever serves this address next.
    await server.stop(grace_s=0)
    await store.close()


def main() -> None:
    settings = config.load(CacheSettings, "cache")
    telemetry.set_up("cache", settings)
    mutual_tls.set_up("cache", settings)
    serve.run("cache", lambda stop: serve_cache(settings, stop))


if __name__ == "__main__":
    main()
