"""Puts the parts of a running worker together: engine thread, executions, server, links to schedulers and caches."""

import asyncio
import logging
import secrets

from prometheus_client import REGISTRY, CollectorRegistry

from headrace.v1 import cache_pb2, scheduler_pb2, worker_pb2, worker_pb2_grpc
from services.common.channel import cancel_and_wait, host_port, reachable
from services.common.kv_wire import with_chunks
from services.common.serve import GrpcServer, Registration, Stop, stopped
from services.common.tracing import Tracer, make_tracer
from services.worker.build import LoadedModel
from services.worker.cache_link import CacheLink
from services.worker.cancellations import Cancellations
from services.worker.capacity import Capacity
from services.worker.config import Role, WorkerSettings
from services.worker.drain import Drain
from services.worker.engine_loop import EngineLoop, EngineStatus, Turn
from services.worker.executions import Executions
from services.worker.kv_export import KvExporter, Prefills
from services.worker.kv_import import KvImporter, Patience
from services.worker.kv_metrics import KvMetrics
from services.worker.kv_offload import KvOffloader
from services.worker.machine_metrics import register_machine_metrics
from services.worker.memory_metrics import show_memory
from services.worker.metrics import WorkerMetrics
from services.worker.prefill_rate import PrefillRate
from services.worker.profiling import Profiler
from services.worker.request_metrics import RequestMetrics
from services.worker.run_traces import RunTraces
from services.worker.scheduler_links import SchedulerLinks, WorkerLoad
from services.worker.servicer import WorkerServicer

log = logging.getLogger(__name__)

_SIGN_OF_LIFE_S = 1.0
_STOP_GRACE_S = 2.0  # for the last messages of streams that have ended
_ROLES: dict[Role, scheduler_pb2.WorkerRole.ValueType] = {
    "both": scheduler_pb2.WORKER_ROLE_BOTH,
    "prefill": scheduler_pb2.WORKER_ROLE_PREFILL,
    "decode": scheduler_pb2.WORKER_ROLE_DECODE,
}


class WorkerService:
    """One worker around a loaded model. A new one is a new incarnation."""

    def __init__(self, settings: WorkerSettings, model: LoadedModel, registry: CollectorRegistry = REGISTRY) -> None:
        self.summary = model.summary
        self._settings = settings
        self._role: Role = settings.role
        self._model = model
        self._incarnation = secrets.token_hex(8)
        self._engine = EngineLoop(model.engine, model.limits.block_size)
        exchange = self._engine.exchange
        self._metrics = WorkerMetrics(model.limits.name, lambda: 1 - exchange.free_blocks / model.num_blocks, registry)
        show_memory(model.device, registry)
        register_machine_metrics(model.limits.name, self._engine, model.price_per_hour, registry)
        self._capacity = Capacity(
            max_sequences=settings.max_sequences,
            max_pending_prefill_tokens=self._most_pending_prefill_tokens(),
            free_blocks=lambda: exchange.free_blocks,
        )
        self._prefill_rate = PrefillRate()
        kv_metrics = KvMetrics(registry)
        patience = Patience(settings.kv_fetch_stall_s, settings.kv_prefill_stall_s)
        self._importer = KvImporter(exchange, model.kv_format, model.block_bytes, patience, kv_metrics)
        exporter = KvExporter(exchange, model.kv_format, kv_metrics)
        block_size = model.limits.block_size
        self._offloader = KvOffloader(
            exporter, settings.caches, model.kv_format, block_size, settings.kv_offload_least_tokens, kv_metrics
        )
        tracer = make_tracer("worker", settings)
        self._cancellations = Cancellations(self._engine, registry)
        self._executions = self._make_executions(registry, tracer)
        self._prefills = self._make_prefills(exporter)
        self._drain = Drain(self._executions, self._prefills, settings.drain_grace_s)
        self._server = self._make_server(exporter, Profiler(settings.id, self._engine, kv_metrics, block_size), tracer)
        self._status: EngineStatus | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._schedulers: SchedulerLinks
        self._cache: CacheLink

    def _make_executions(self, registry: CollectorRegistry, tracer: Tracer) -> Executions:
        model = self._model
        return Executions(
            self._engine,
            self._capacity,
            model.limits,
            self._importer,
            self._prefill_rate,
            self._cancellations,
            RequestMetrics(model.limits.name, registry),
            RunTraces(tracer, model.limits.name),
            self._on_settled,
            model.price_per_hour,
        )

    def _make_prefills(self, exporter: KvExporter) -> Prefills:
        model = self._model
        return Prefills(
            self._engine,
            exporter,
            self._capacity,
            model.limits,
            self._cancellations,
            draining=lambda: self._executions.draining,
            on_settled=self._on_settled,
            on_left=lambda: self._schedulers.notify(),
            price_per_hour=model.price_per_hour,
        )

    def _make_server(self, exporter: KvExporter, profiler: Profiler, tracer: Tracer) -> GrpcServer:
        model = self._model
        servicer = WorkerServicer(
            self._executions,
            exporter,
            self._prefills,
            profiler,
            model.tokenizer_hash,
            model.tokenizer_files,
            tracer,
        )
        name = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
        add = with_chunks(worker_pb2_grpc.add_WorkerServicer_to_server)
        return GrpcServer([Registration(add, servicer, name)])

    async def start(self) -> str:
        """Starts the engine's thread, serves, and makes itself known. Returns the address it listens on."""
        settings = self._settings
        port = await self._server.start(host_port(settings.host, settings.port))
        address = settings.advertise_address or await reachable(settings.host, port)
        self._schedulers = SchedulerLinks(
            self._registration(address), settings.schedulers, self._load, self._on_directive
        )
        self._cache = CacheLink(self._holder(address), settings.caches, self._engine.request_snapshot)
        self._engine.start(self._on_turn)
        await self._server.set_serving(True)
        coroutines = (
            self._engine.ended(),
            self._schedulers.run(),
            self._cache.run(),
            self._offloader.run(),
            self._send_signs_of_life(),
        )
        self._tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        return host_port(settings.host, port)

    async def stopped(self, stop: Stop) -> None:
        """Returns when `stop` is set; raises what the engine, or a link that is to last, died of if one did."""
        await stopped(stop, self._tasks)

    async def stop(self, drain_grace_s: float) -> None:
        """Readiness off, no new work; running work finishes within the grace or goes on elsewhere; then all ends.

        Raises what the engine died of if it died, in which case nothing is waited for.
        """
        await self._server.set_serving(False)
        stop_grace_s = 0.0
        try:
            await self._finish_work(drain_grace_s)
            stop_grace_s = _STOP_GRACE_S
        finally:
            await cancel_and_wait(self._tasks)
            await self._server.stop(stop_grace_s)
            await self._importer.close()

    async def _finish_work(self, drain_grace_s: float) -> None:
        drained = asyncio.create_task(self._drain.finish(drain_grace_s))
        died = asyncio.create_task(self._engine.ended())
        self._schedulers.notify()
        try:
            await asyncio.wait({drained, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                died.result()
            await self._engine.stop()
        finally:
            await cancel_and_wait([drained])

    def _on_turn(self, turn: Turn) -> None:
        """Called on the event loop after each turn of the engine."""
        self._status = turn.status
        self._capacity.observe(turn.status)
        self._executions.deliver(turn)
        self._prefills.observe(turn)
        self._cancellations.observe(turn)
        self._offloader.observe(turn)
        self._prefill_rate.observe(turn)
        if turn.held_blocks is not None:
            self._cache.publish_snapshot(turn.held_blocks)
        if turn.result is not None:
            self._cache.publish(turn.result.block_events)
        self._metrics.observe(turn)
        self._schedulers.notify()

    def _on_settled(self, request_id: str, attempt: int, sequences: int, prompt_tokens: int) -> None:
        self._schedulers.settle(request_id, attempt, sequences, prompt_tokens)

    def _on_directive(self, directive: scheduler_pb2.WorkerDirective) -> None:
        """A scheduler wants something of this worker."""
        roles = dict(zip(_ROLES.values(), _ROLES, strict=True))
        if (role := roles.get(directive.set_role)) is not None:
            log.info("role %s, and %s before", role, self._role)
            self._role = role
            self._capacity.max_pending_prefill_tokens = self._most_pending_prefill_tokens()
        if directive.HasField("set_draining"):
            if directive.set_draining:
                self._drain.begin()
            else:
                self._drain.undo()
        self._schedulers.notify()

    def _most_pending_prefill_tokens(self) -> int:
        """A decode worker takes on one step's worth of prompts: what is more is for prefill workers."""
        settings = self._settings
        limit = settings.max_pending_prefill_tokens
        return min(limit, settings.max_batch_tokens) if self._role == "decode" else limit

    def _load(self) -> WorkerLoad:
        status = self._status
        return WorkerLoad(
            step=status.counters.steps if status else 0,
            running=status.running if status else 0,
            waiting=max(0, self._capacity.live_sequences - (status.running if status else 0)),
            free_blocks=self._engine.exchange.free_blocks,
            pending_prefill_tokens=self._capacity.pending_prefill_tokens,
            free=self._capacity.free,
            draining=self._executions.draining,
            prefill_tokens_per_s=self._prefill_rate.measured,
            role=_ROLES[self._role],
            prefix_queried_tokens=status.counters.prefix_queried_tokens if status else 0,
            prefix_hit_tokens=status.counters.prefix_hit_tokens if status else 0,
        )

    def _registration(self, address: str) -> scheduler_pb2.Registration:
        limits = self._model.limits
        return scheduler_pb2.Registration(
            worker_id=self._settings.id,
            incarnation=self._incarnation,
            address=address,
            model=scheduler_pb2.ModelInfo(
                name=limits.name,
                max_context_tokens=limits.max_context_tokens,
                vocabulary_size=limits.vocabulary_size,
                block_size=limits.block_size,
                tokenizer_hash=self._model.tokenizer_hash,
            ),
            kv_format=self._model.kv_format,
            role=_ROLES[self._role],
            max_sequences=self._settings.max_sequences,
            total_blocks=self._model.num_blocks,
            block_bytes=self._model.block_bytes,
            deterministic=self._settings.deterministic,
            price_per_hour=self._model.price_per_hour,
        )

    def _holder(self, address: str) -> cache_pb2.Holder:
        return cache_pb2.Holder(
            id=self._settings.id,
            incarnation=self._incarnation,
            address=address,
            kv_format=self._model.kv_format,
            kind=cache_pb2.Holder.KIND_WORKER,
        )

    async def _send_signs_of_life(self) -> None:
        while True:
            await asyncio.sleep(_SIGN_OF_LIFE_S)
            self._executions.send_signs_of_life()
