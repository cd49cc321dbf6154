"""Running one service process: the gRPC server with health and reflection, and signals that drain before they kill."""

import asyncio
import ctypes
import gc
import logging
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from services.common.channel import SERVER_OPTIONS
from services.common.errors import ErrorInterceptor
from services.common.log_levels import follow_signals
from services.common.mutual_tls import server_credentials
from services.common.tls import Front

log = logging.getLogger(__name__)

_FILES = 65_536

Stop = asyncio.Event
"""Set by the first SIGTERM or SIGINT: turn readiness off, take no new work, finish the running work, return."""


def run(name: str, service: Callable[[Stop], Awaitable[None]]) -> None:
    """Runs a service until it returns after the first signal; a second signal ends the process at once."""
    try:
        uvloop.run(_run(name, service))
    except OSError as error:  # most often a port in use, or an address that is not ours
        log.error("%s failed: %s", name, error)
        log.debug("where it failed:", exc_info=error)
        raise SystemExit(1) from None


async def stopped(stop: Stop, tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Returns when `stop` is set, or one of a service's tasks ends before; raises what that task died of."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        stopping.cancel()


async def _run(name: str, service: Callable[[Stop], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            log.warning("%s: second signal, ending at once", name)
            os._exit(1)
        log.info("%s: draining", name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    follow_signals(loop)
    _raise_file_limit()
    freeze_heap()
    await service(stop)
    log.info("%s: stopped", name)


def _raise_file_limit() -> None:
    """A connection is an open file, and the limit that a process may raise itself is often 1,024."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, min(most, _FILES)), most))


def freeze_heap() -> None:
    """What is loaded by now stays until the end: the garbage collector need not walk it again and again.

    A full collection stops a worker for 0.13 s, a gateway for 0.06 s, nearly all of it for modules and models.
    """
    gc.collect()
    gc.freeze()
    give_back_memory()


def give_back_memory() -> None:
    """What loading took and freed goes back to the system, as far as the C library (glibc) kept it.

    200 MiB of a worker's with a model, 30 MiB of a gateway's with a tokenizer.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class Registration:
    """A servicer, the generated function that adds it to a server, and its full name for health and reflection."""

    add: Callable[[Any, grpc.aio.Server], None]
    servicer: Any
    service_name: str


class GrpcServer:
    """A gRPC server with grpc.health.v1 and reflection. Not serving until `set_serving(True)`."""

    def __init__(
        self,
        registrations: Iterable[Registration],
        front: Front | None = None,
        limits: Sequence[tuple[str, int]] = (),
    ) -> None:
        """`front` and `limits`, as gRPC's options: of a public server. Others are for services: they demand
        certificates if this process has one.
        """
        self._front = front
        options = {**dict(SERVER_OPTIONS), **dict(limits)}  # of an option that is given twice gRPC takes the first
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=tuple(options.items()))
        self._health = health_aio.HealthServicer()
        self._names = ["", *(item.service_name for item in registrations)]
        for item in registrations:
            item.add(item.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection([*self._names[1:], health_name, reflection.SERVICE_NAME], self._server)

    async def start(self, address: str) -> int:
        """Binds `host:port` (port 0: any free one) and answers, health saying NOT_SERVING. Returns the port.

        Raises OSError when the address cannot be bound.
        """
        try:
            port = self._add_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self.set_serving(False)
        await self._server.start()
        return port

    def _add_port(self, address: str) -> int:
        credentials = self._front.grpc_credentials if self._front else server_credentials()
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server as a whole and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for `grace_s` seconds, then cancels them."""
        await self._server.stop(grace_s)
