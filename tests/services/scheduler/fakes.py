"""A gateway, a worker and a cache that speak over real gRPC and do as the test says, and a real scheduler."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from headrace.v1 import cache_pb2, cache_pb2_grpc
from headrace.v1.cache_pb2 import Holder, HolderBlocks, IndexUpdate, SnapshotEnd
from headrace.v1.job_pb2 import Job
from headrace.v1.scheduler_pb2 import (
    WORKER_ROLE_BOTH,
    Adoption,
    AttemptReport,
    Catalog,
    Credits,
    DescribeFleetRequest,
    GatewayHello,
    GatewayMessage,
    ModelInfo,
    Offer,
    OfferAnswer,
    PlacementKey,
    PlacementRefusal,
    PlacementRequest,
    Registration,
    SchedulerMessage,
    WorkerReport,
    WorkerRole,
    WorkerState,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import Outbox, cancel_and_wait, dial
from services.common.redis.keys import Owner
from services.common.redis.queue import JobQueue
from services.scheduler.__main__ import serve_scheduler
from services.scheduler.config import SchedulerSettings
from services.scheduler.metrics import SchedulerMetrics
from tests.redis_server import free_port

MODEL = "m"
LEASE_S = 0.6


class RunningScheduler:
    """The real service, in this process."""

    def __init__(self, redis_url: str, **settings: object) -> None:
        fields: dict[str, object] = {
            "redis_url": redis_url,
            "port": free_port(),
            "caches": (),
            "lease_s": LEASE_S,
            "reclaim_interval_s": 0.1,
            "worker_silence_s": 60,
        }
        self.settings = SchedulerSettings.model_validate(fields | settings)
        self.address = f"127.0.0.1:{self.settings.port}"
        self.registry = CollectorRegistry()
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(serve_scheduler(self.settings, SchedulerMetrics(self.registry), self.stop))

    async def ready(self) -> None:
        async with dial(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            async for response in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    async def until_granted(self, worker_id: str, sequences: int) -> None:
        """Returns when a worker's report of so many free sequences has come."""
        await self._until(lambda states: worker_id in states and states[worker_id].credits.sequences == sequences)

    async def until_left(self, worker_id: str) -> None:
        await self._until(lambda states: worker_id not in states)

    async def _until(self, found: Callable[[dict[str, WorkerState]], bool]) -> None:
        """Returns when what the workers have reported is so."""
        async with dial(self.address) as channel, asyncio.timeout(10):
            while True:
                fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
                if found({worker.registration.worker_id: worker.state for worker in fleet.workers}):
                    return
                await asyncio.sleep(0.01)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until_metric(self, expected: float, name: str, **labels: str) -> None:
        """Returns when the metric has this value: what a gateway does next may be seen before it is counted."""
        async with asyncio.timeout(10):
            while self.metric(name, **labels) != expected:  # noqa: ASYNC110 - counters tell nobody
                await asyncio.sleep(0.005)

    async def terminate(self) -> None:
        self.stop.set()
        await self.task

    async def die(self) -> None:
        """Ends without a word to Redis."""
        await cancel_and_wait([self.task])


@asynccontextmanager
async def running_scheduler(redis_url: str, **settings: object) -> AsyncIterator[RunningScheduler]:
    scheduler = RunningScheduler(redis_url, **settings)
    await scheduler.ready()
    yield scheduler
    await scheduler.terminate()


class FakeCache(cache_pb2_grpc.CacheServicer):
    """Streams to each watcher what the test puts in; None ends the stream."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[IndexUpdate | None] = asyncio.Queue()
        self.watchers: asyncio.Queue[str] = asyncio.Queue()

    async def Watch(self, request: cache_pb2.WatchRequest, context: object) -> AsyncIterator[IndexUpdate]:
        self.watchers.put_nowait(request.scheduler_id)
        while (update := await self.updates.get()) is not None:
            yield update

    def snapshot(
        self,
        epoch: str,
        *blocks: bytes,
        holder: str = "a",
        address: str = "",
        kind: "Holder.Kind.ValueType" = Holder.KIND_WORKER,
    ) -> None:
        """A block's digest is its name."""
        joined = Holder(id=holder, incarnation="1", kv_format="f", address=address, kind=kind)
        stored = b"".join(blocks)
        for sequence, update in enumerate(
            (
                IndexUpdate(holder_joined=joined),
                IndexUpdate(blocks=HolderBlocks(holder_id=holder, replace=True, stored=stored, stored_digests=stored)),
                IndexUpdate(snapshot_end=SnapshotEnd(blocks=len(blocks))),
            ),
            start=1,
        ):
            update.epoch, update.sequence = epoch, sequence
            self.updates.put_nowait(update)

    def stored(self, epoch: str, sequence: int, block: bytes) -> None:
        change = HolderBlocks(holder_id="a", stored=block)
        self.updates.put_nowait(IndexUpdate(epoch=epoch, sequence=sequence, blocks=change))


@asynccontextmanager
async def serving_cache(cache: FakeCache) -> AsyncIterator[str]:
    """Its address."""
    server = grpc.aio.server()
    cache_pb2_grpc.add_CacheServicer_to_server(cache, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


class FakeWorker:
    """Registers and reports what it is told to."""

    def __init__(
        self,
        scheduler: RunningScheduler,
        id: str = "w",
        incarnation: str = "1",
        max_sequences: int = 8,
        role: "WorkerRole.ValueType" = WORKER_ROLE_BOTH,
    ) -> None:
        self.id = id
        self._outbox: Outbox[WorkerReport] = Outbox()
        model = ModelInfo(name=MODEL, max_context_tokens=2048, vocabulary_size=100, block_size=16, tokenizer_hash="t")
        registration = Registration(
            worker_id=id,
            incarnation=incarnation,
            address=f"{id}:1",
            model=model,
            kv_format="f",
            max_sequences=max_sequences,
            total_blocks=1000,
            block_bytes=1000,
            role=role,
        )
        self._outbox.put(WorkerReport(registration=registration))
        self._task = asyncio.create_task(self._talk(scheduler.address))

    def grant(
        self, sequences: int, *settled: str, running: int = 0, free_blocks: int = 0, draining: bool = False
    ) -> None:
        """Reports what is free. `settled` names placements, `ID` or `ID/ATTEMPT`."""
        keys = [(item.partition("/")[0], int(item.partition("/")[2] or 1)) for item in settled]
        state = WorkerState(
            credits=Credits(sequences=sequences, blocks=sequences * 50, prefill_tokens=sequences * 1000),
            settled=[PlacementKey(request_id=id, attempt=attempt) for id, attempt in keys],
            running_sequences=running,
            free_blocks=free_blocks,
            draining=draining,
        )
        self._outbox.put(WorkerReport(state=state))

    async def leave(self) -> None:
        await cancel_and_wait([self._task])

    async def _talk(self, address: str) -> None:
        async with dial(address) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in SchedulerStub(channel).Register(self._outbox, wait_for_ready=True):
                    pass


class FakeGateway:
    """Enqueues jobs and answers offers as the test says. Its heart beats until `die`."""

    def __init__(self, redis_url: str, id: str = "g") -> None:
        self.id = id
        self.queue = JobQueue(redis_url, Owner("gateway", id, "1"), lease_s=LEASE_S)
        self.offers: asyncio.Queue[Offer] = asyncio.Queue()
        self.refusals: asyncio.Queue[PlacementRefusal] = asyncio.Queue()
        self.adoptions: asyncio.Queue[Adoption] = asyncio.Queue()
        self.catalogs: asyncio.Queue[Catalog] = asyncio.Queue()
        self._running: dict[str, tuple[Job, str]] = {}
        self._outbox: Outbox[GatewayMessage] = Outbox()
        self._beating = asyncio.create_task(self._beat())
        self._talking: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()

    async def connect(self, scheduler: RunningScheduler) -> None:
        self._outbox = Outbox()
        self._outbox.put(GatewayMessage(hello=GatewayHello(gateway_id=self.id, incarnation="1")))
        self._talking.append(asyncio.create_task(self._talk(scheduler.address)))
        await self.catalogs.get()

    async def disconnect(self) -> None:
        await cancel_and_wait(self._talking)
        self._talking.clear()

    def job(self, request_id: str = "", **fields: object) -> Job:
        job = Job(
            request_id=request_id or f"r{next(self._numbers)}",
            gateway_id=self.id,
            gateway_incarnation="1",
            model=MODEL,
            prompt_tokens=32,
            choices=1,
            max_tokens=10,
            enqueued_unix_ms=int(time.time() * 1000),
        )
        job.MergeFrom(Job(**fields))  # type: ignore[arg-type]
        return job

    async def submit(self, request_id: str = "", **fields: object) -> tuple[Job, str]:
        job = self.job(request_id, **fields)
        return job, await self.queue.enqueue(job)

    def answer(self, offer: Offer, status: "OfferAnswer.Status.ValueType") -> None:
        answer = OfferAnswer(request_id=offer.request_id, attempt=offer.attempt, status=status)
        self._outbox.put(GatewayMessage(answers=[answer]))

    async def accept(self, offer: Offer, job: Job) -> None:
        assert not await self.queue.take_over([(job, offer.queue_entry_id)])
        self._running[job.request_id] = (job, offer.queue_entry_id)
        self.answer(offer, OfferAnswer.STATUS_ACCEPTED)

    async def adopt(self, adoption: Adoption) -> None:
        assert not await self.queue.take_over([(adoption.job, adoption.queue_entry_id)])
        self._running[adoption.job.request_id] = (adoption.job, adoption.queue_entry_id)

    async def finish(self, job: Job) -> None:
        await self.queue.acknowledge([self._running.pop(job.request_id)])

    def request(self, request: PlacementRequest) -> None:
        self._outbox.put(GatewayMessage(placement_request=request))

    def report(self, event: "AttemptReport.Event.ValueType", offer: Offer | None = None, **fields: object) -> None:
        """Says how an attempt went: that of an offer, or one on worker `w`."""
        report = AttemptReport(worker_id="w", worker_incarnation="1", event=event)
        if offer is not None:
            report.request_id, report.attempt, report.probe = offer.request_id, offer.attempt, offer.placement.probe
            report.worker_id = offer.placement.worker_id
        report.MergeFrom(AttemptReport(**fields))  # type: ignore[arg-type]
        self._outbox.put(GatewayMessage(attempt_report=report))

    async def pause(self) -> None:
        """Renews nothing for a while."""
        await cancel_and_wait([self._beating])

    def resume(self) -> None:
        self._beating = asyncio.create_task(self._beat())

    async def die(self) -> None:
        """Its streams break, and its heart stops."""
        await self.disconnect()
        await cancel_and_wait([self._beating])

    async def close(self) -> None:
        await self.die()
        await self.queue.close()

    async def _beat(self) -> None:
        while True:
            await self.queue.renew(self._running.values())
            await asyncio.sleep(LEASE_S / 4)

    async def _talk(self, address: str) -> None:
        async with dial(address) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for message in SchedulerStub(channel).Place(self._outbox, wait_for_ready=True):
                    self._receive(message)

    def _receive(self, message: SchedulerMessage) -> None:
        for offer in message.offers:
            self.offers.put_nowait(offer)
        if message.HasField("refusal"):
            self.refusals.put_nowait(message.refusal)
        elif message.HasField("adoption"):
            self.adoptions.put_nowait(message.adoption)
        elif message.HasField("catalog"):
            self.catalogs.put_nowait(message.catalog)
