"""The Scheduler service on the wire: translates, and delegates to the fleet, the gateways and the models."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc.aio

from headrace.v1 import scheduler_pb2, scheduler_pb2_grpc
from services.common.channel import Outbox
from services.common.errors import InvalidRequest
from services.scheduler.cache_watch import CacheWatch
from services.scheduler.fleet import Fleet
from services.scheduler.gateways import Gateways, GatewaySession
from services.scheduler.models import Models
from services.scheduler.worker import Worker

log = logging.getLogger(__name__)

_ENTRY_ID = re.compile(r"[0-9]+-[0-9]+")

Context = grpc.aio.ServicerContext[Any, Any]


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServicer):
    """Implements `headrace.v1.Scheduler`."""

    def __init__(
        self, scheduler_id: str, fleet: Fleet, gateways: Gateways, models: Models, cache_watch: CacheWatch
    ) -> None:
        self._scheduler_id = scheduler_id
        self._fleet = fleet
        self._gateways = gateways
        self._models = models
        self._cache_watch = cache_watch

    async def Place(
        self, request_iterator: AsyncIterator[scheduler_pb2.GatewayMessage], context: Context
    ) -> AsyncIterator[scheduler_pb2.SchedulerMessage]:
        first = await anext(request_iterator, None)
        if first is None or not first.hello.gateway_id or not first.hello.incarnation:
            raise InvalidRequest("A Place stream begins with a hello that names the gateway and its incarnation.")
        session = self._gateways.connect(first.hello, self._fleet.catalog())
        self._models.gateway_connected(session.key)
        try:
            async for message in _while_read(session.outbox, self._read_gateway(request_iterator, session)):
                yield message
        finally:
            self._gateways.leave(session)

    async def Register(
        self, request_iterator: AsyncIterator[scheduler_pb2.WorkerReport], context: Context
    ) -> AsyncIterator[scheduler_pb2.WorkerDirective]:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("registration"):
            raise InvalidRequest("A Register stream begins with a registration.")
        worker = self._fleet.register(first.registration)
        try:
            async for directive in _while_read(worker.outbox, self._read_worker(request_iterator, worker)):
                yield directive
        finally:
            self._fleet.leave(worker)

    async def SetRole(self, request: scheduler_pb2.SetRoleRequest, context: Context) -> scheduler_pb2.SetRoleResponse:
        if request.role not in (
            scheduler_pb2.WORKER_ROLE_BOTH,
            scheduler_pb2.WORKER_ROLE_PREFILL,
            scheduler_pb2.WORKER_ROLE_DECODE,
        ):
            raise InvalidRequest("A worker's role is both, prefill or decode.", field="role")
        self._fleet.set_role(request.worker_id, request.role)
        return scheduler_pb2.SetRoleResponse()

    async def DrainWorker(
        self, request: scheduler_pb2.DrainWorkerRequest, context: Context
    ) -> scheduler_pb2.DrainWorkerResponse:
        return scheduler_pb2.DrainWorkerResponse(other_workers=self._fleet.drain(request.worker_id, undo=request.undo))

    async def DescribeFleet(
        self, request: scheduler_pb2.DescribeFleetRequest, context: Context
    ) -> scheduler_pb2.DescribeFleetResponse:
        return scheduler_pb2.DescribeFleetResponse(
            scheduler_id=self._scheduler_id,
            workers=self._fleet.describe(),
            indexed_blocks=self._cache_watch.index.blocks,
            connected_gateways=len(self._gateways),
            held_jobs=self._models.held_jobs,
        )

    async def _read_gateway(
        self, messages: AsyncIterator[scheduler_pb2.GatewayMessage], session: GatewaySession
    ) -> None:
        async for message in messages:
            for answer in message.answers:
                session.answered(answer)
            kind = message.WhichOneof("message")
            if kind == "placement_request":
                self._request(message.placement_request, session)
            elif kind == "attempt_report":
                self._fleet.hear(message.attempt_report)

    def _request(self, request: scheduler_pb2.PlacementRequest, session: GatewaySession) -> None:
        if not _ENTRY_ID.fullmatch(request.queue_entry_id):
            raise InvalidRequest(f"{request.queue_entry_id!r} is no queue entry's id.", field="queue_entry_id")
        if (request.job.gateway_id, request.job.gateway_incarnation) != session.key:
            raise InvalidRequest(f"Request {request.job.request_id} is another gateway's.", field="placement_request")
        self._models.request(request)

    async def _read_worker(self, reports: AsyncIterator[scheduler_pb2.WorkerReport], worker: Worker) -> None:
        async for report in reports:
            if not report.HasField("state"):
                raise InvalidRequest("A worker registers once, then reports its state.")
            self._fleet.report(worker, report.state)


async def _while_read(outbox: Outbox[Any], reading: Coroutine[Any, Any, None]) -> AsyncIterator[Any]:
    """What is put into the outbox, until the other side has said its last word. Raises what reading raises."""
    reader = asyncio.create_task(reading)
    reader.add_done_callback(lambda _: outbox.close())
    try:
        async for message in outbox:
            yield message
        if reader.done():
            reader.result()
    finally:
        # Not awaited: CPython 3.11 crashes when a second cancellation meets a nested async generator that awaits here.
        reader.cancel()
