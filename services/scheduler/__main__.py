"""Composition root of the scheduler: `python -m services.scheduler`."""

import asyncio
import logging
import secrets

from headrace.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common import config, mutual_tls, serve, telemetry
from services.common.channel import cancel_and_wait, host_port
from services.common.errors import Unavailable
from services.common.metrics_switch import registry_of
from services.common.redis.client import UnfitRedis
from services.common.redis.keys import Owner
from services.common.redis.queue import JobQueue
from services.common.tracing import make_tracer
from services.scheduler.breaker import BreakerPolicy
from services.scheduler.cache_watch import CacheWatch
from services.scheduler.config import SchedulerSettings
from services.scheduler.dispatch import Dispatcher, Timing
from services.scheduler.fleet import Fleet
from services.scheduler.gateways import Gateways
from services.scheduler.intake import Intake
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.models import Models
from services.scheduler.servicer import SchedulerServicer

log = logging.getLogger("services.scheduler")

_ASK_REDIS_AGAIN_S = 0.5


async def serve_scheduler(settings: SchedulerSettings, metrics: SchedulerMetrics, stop: asyncio.Event) -> None:
    """Runs the service until `stop` is set. Raises UnfitRedis if queued requests would not be safe in this Redis."""
    fleet = _make_fleet(settings)
    gateways = Gateways()
    cache_watch = CacheWatch(settings.id, metrics)
    owner = Owner("scheduler", settings.id, secrets.token_hex(4))
    queue = JobQueue(settings.redis_url, owner, lease_s=settings.lease_s)
    tracer = make_tracer("scheduler", settings)
    timing = Timing(lease_s=settings.lease_s, patience_s=settings.replacement_patience_s)

    def make_dispatcher(model: str) -> Dispatcher:
        return Dispatcher(
            model,
            settings.id,
            fleet,
            gateways,
            lambda: cache_watch.index,
            metrics,
            timing,
            settings.policy,
            tracer=tracer,
        )

    def make_intake(model: str, dispatcher: Dispatcher) -> Intake:
        return Intake(model, queue, dispatcher, metrics, interval_s=settings.reclaim_interval_s)

    models = Models(make_dispatcher, make_intake)
    fleet.listen(on_report=models.wake, on_catalog=lambda: gateways.announce(fleet.catalog()))
    servicer = SchedulerServicer(settings.id, fleet, gateways, models, cache_watch)
    name = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].full_name
    server = serve.GrpcServer([serve.Registration(scheduler_pb2_grpc.add_SchedulerServicer_to_server, servicer, name)])
    port = await server.start(host_port(settings.host, settings.port))
    watching = asyncio.create_task(cache_watch.run(settings.caches), name="watch caches")
    try:
        if await _wait_for_redis(queue, settings, stop):
            models.open()
            await server.set_serving(True)
            log.info("ready on %s, id %s", host_port(settings.host, port), settings.id)
        await serve.stopped(stop, [watching])
        await server.set_serving(False)
        await models.drain(settings.drain_grace_s)
    finally:
        await server.stop(grace_s=0)  # its streams never end by themselves; gateways and workers go on elsewhere
        await models.stop()
        await cancel_and_wait([watching])
        await queue.close()


def _make_fleet(settings: SchedulerSettings) -> Fleet:
    breakers = BreakerPolicy(
        failures=settings.breaker_failures,
        first_backoff_s=settings.breaker_backoff_s,
        longest_backoff_s=settings.breaker_longest_backoff_s,
        probe_timeout_s=settings.breaker_probe_timeout_s,
    )
    return Fleet(
        silence_s=settings.worker_silence_s,
        placement_timeout_s=settings.placement_timeout_s,
        memory_s=settings.replacement_patience_s,
        breakers=breakers,
    )


async def _wait_for_redis(queue: JobQueue, settings: SchedulerSettings, stop: asyncio.Event) -> bool:
    """Whether Redis has answered before `stop`."""
    waiting = False
    while not stop.is_set():
        try:
            await queue.check(allow_volatile=settings.allow_volatile_redis)
            return True
        except Unavailable as error:
            if not waiting:
                log.warning("waiting for Redis: %s", error)
            waiting = True
            await asyncio.sleep(_ASK_REDIS_AGAIN_S)
    return False


async def _serve_with_metrics(settings: SchedulerSettings, stop: serve.Stop) -> None:
    telemetry.serve_metrics(settings, settings.metrics_port)
    await serve_scheduler(settings, SchedulerMetrics(registry_of(settings)), stop)


def main() -> None:
    settings = config.load(SchedulerSettings, "scheduler")
    telemetry.set_up("scheduler", settings)
    mutual_tls.set_up("scheduler", settings)
    try:
        serve.run("scheduler", lambda stop: _serve_with_metrics(settings, stop))
    except UnfitRedis as error:
        log.error("scheduler cannot start: %s", error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
