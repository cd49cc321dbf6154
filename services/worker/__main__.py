"""Composition root of the worker service: `python -m services.worker`."""

import asyncio
import logging

from services.common import config, mutual_tls, serve, telemetry
from services.common.metrics_switch import registry_of
from services.worker.build import load, run_in_daemon_thread
from services.worker.config import WorkerSettings
from services.worker.engine.model.interface import ModelError, ModelUnavailable
from services.worker.service import WorkerService

log = logging.getLogger("services.worker")

CANNOT_EVER_START = 2  # the exit status for a bad setting too: whoever supervises need not try again


async def serve_worker(settings: WorkerSettings, stop: serve.Stop) -> None:
    """Loads the model, then serves until `stop` is set. Raises when the engine dies."""
    loading = asyncio.ensure_future(run_in_daemon_thread(lambda: load(settings)))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        loading.cancel()
        return
    stopping.cancel()
    service = WorkerService(settings, loading.result(), registry_of(settings))
    serve.freeze_heap()
    metrics_port = telemetry.serve_metrics(settings, settings.metrics_port)
    address = await service.start()
    log.info("ready on %s: %s, id %s, metrics on port %d", address, service.summary, settings.id, metrics_port)
    try:
        await service.stopped(stop)
    finally:
        await service.stop(settings.drain_grace_s)


def main() -> None:
    settings = config.load(WorkerSettings, "worker")
    telemetry.set_up("worker", settings)
    mutual_tls.set_up("worker", settings)
    try:
        serve.run("worker", lambda stop: serve_worker(settings, stop))
    except ModelError as error:
        log.error("cannot start: %s", error)
        raise SystemExit(1 if isinstance(error, ModelUnavailable) else CANNOT_EVER_START) from None


if __name__ == "__main__":
    main()
