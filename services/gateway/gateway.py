"""The gateway put together: what stands behind both fronts, how it starts, and how it drains."""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from functools import partial
from typing import Any

from opentelemetry import trace
from prometheus_client import CollectorRegistry

from headrace.v1 import inference_pb2, inference_pb2_grpc
from headrace.v1.scheduler_pb2 import GatewayHello
from headrace.v1.worker_pb2 import ExecuteHello
from services.common.channel import host_port
from services.common.errors import Unavailable
from services.common.redis.answers import AnswerStore
from services.common.redis.costs import CostStore
from services.common.redis.dead_letters import DeadLetters
from services.common.redis.key_store import KeyStore
from services.common.redis.keys import Owner
from services.common.redis.limits import LimitStore
from services.common.redis.queue import JobQueue
from services.common.serve import GrpcServer, Registration, Stop
from services.common.tls import open_front
from services.gateway.active_request import ActiveRequest, ActiveRequests
from services.gateway.admission import Admission
from services.gateway.answers.answers import Answers
from services.gateway.answers.leases import Leases
from services.gateway.catalog import Catalog
from services.gateway.cluster import Cluster
from services.gateway.config import GatewaySettings
from services.gateway.costs.cost_book import CostBook
from services.gateway.costs.metrics import CostMetrics
from services.gateway.generate import Generator
from services.gateway.http.app import HttpApp
from services.gateway.http.callers import Callers
from services.gateway.http.cluster_api import cluster_route
from services.gateway.http.cors import Cors
from services.gateway.http.exchange import AsgiApp
from services.gateway.http.input_limits import grpc_limits, http_limits
from services.gateway.http.openai_api import CompletionRoute, chat_kind, completion_kind, whole_response
from services.gateway.http.openai_requests import RequestReader
from services.gateway.http.post_route import PostRoute
from services.gateway.http.server import HttpServer
from services.gateway.http.tokenize_api import token_routes
from services.gateway.inference_servicer import InferenceServicer
from services.gateway.keys.key_file import KeyFile
from services.gateway.keys.keys import Keys
from services.gateway.keys.limits import KeyLimits
from services.gateway.keys.prices import read_prices
from services.gateway.links.placement_links import PlacementLinks
from services.gateway.links.worker_links import WorkerLinks
from services.gateway.metrics import Metrics
from services.gateway.readiness import Readiness
from services.gateway.request_log import RequestLog
from services.gateway.shedder import Shedder
from services.gateway.state_metrics import show_state
from services.gateway.tracing import Tracing

log = logging.getLogger(__name__)

_LAST_WORDS_S = 5.0


class Gateway:
    """One gateway instance. `start`, then `run`. Raises ConfigError for a bad file of keys, prices or certificates."""

    def __init__(self, settings: GatewaySettings, registry: CollectorRegistry) -> None:
        self._settings = settings
        incarnation = secrets.token_hex(8)
        owner = Owner("gateway", settings.id, incarnation)
        self._queue = JobQueue(settings.redis_url, owner)
        self._active = ActiveRequests()
        self._workers = WorkerLinks(
            ExecuteHello(gateway_id=settings.id, incarnation=incarnation),
            silence_s=settings.worker_silence_s,
            stall_s=settings.worker_stall_s,
        )
        self._catalog = Catalog(memory_s=settings.model_memory_s, on_workers=self._workers.follow)
        hello = GatewayHello(gateway_id=settings.id, incarnation=incarnation)
        self._placements = PlacementLinks(settings.schedulers, hello, self._active, self._catalog)
        self._dead_letters = DeadLetters(self._queue.redis)
        self._leases = Leases(
            self._queue, self._dead_letters, self._active, allow_volatile=settings.allow_volatile_redis
        )
        self._keys = Keys(KeyStore(self._queue.redis), KeyFile(settings.keys_file), settings)
        self._limits = KeyLimits(LimitStore(self._queue.redis), read_prices(settings.prices))
        shedder = Shedder(max_wait_s=settings.max_wait_s, clock=time.monotonic, draw=random.random)
        self._admission = Admission(
            self._active, shedder, max_requests=settings.max_requests, gateway_id=settings.id, incarnation=incarnation
        )
        self._readiness = Readiness(self._catalog, self._leases, self._placements)
        metrics = Metrics(registry)
        self._stats = metrics.stats
        show_state(registry, self._active, self._leases, self._limits)
        self._costs = CostBook(
            CostStore(self._queue.redis), CostMetrics(registry), writer=incarnation, keep_days=settings.cost_days
        )
        self._answers = self._make_answers(owner, self._make_generator(metrics), metrics)
        self._make_fronts(metrics)

    def _make_generator(self, metrics: Metrics) -> Generator:
        settings = self._settings
        return Generator(
            admission=self._admission,
            active=self._active,
            queue=self._queue,
            leases=self._leases,
            limits=self._limits,
            costs=self._costs,
            placements=self._placements,
            workers=self._workers,
            metrics=metrics,
            tracing=Tracing(trace.get_tracer("headrace.gateway") if settings.otlp_endpoint else None),
            request_log=RequestLog(texts=settings.log_texts),
            max_attempts=settings.max_attempts,
            resume_patience_s=settings.resume_patience_s,
        )

    def _make_answers(self, owner: Owner, generator: Generator, metrics: Metrics) -> Answers:
        settings = self._settings
        return Answers(
            AnswerStore(self._queue.redis, owner, ttl_s=settings.answer_ttl_s),
            generator,
            self._admission,
            self._keys,
            self._active,
            self._queue,
            self._catalog,
            metrics,
            max_recorded_tokens=settings.max_recorded_tokens,
            max_readers=settings.max_readers,
        )

    def _make_fronts(self, metrics: Metrics) -> None:
        """Makes both public servers, which listen from `start` on."""
        settings = self._settings
        front = open_front(settings.tls_cert, settings.tls_key)
        self._http = HttpServer(
            self._asgi_app(metrics), settings.host, settings.http_port, http_limits(settings), front.http_context
        )
        service_name = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
        servicer = InferenceServicer(self._answers, self._admission, self._keys, self._catalog, metrics, settings)
        self._grpc = GrpcServer(
            [Registration(inference_pb2_grpc.add_InferenceServicer_to_server, servicer, service_name)],
            front,
            grpc_limits(settings),
        )

    def _http_app(self, metrics: Metrics) -> HttpApp:
        reader = RequestReader(self._catalog, self._settings)
        completion, chat = completion_kind(reader), chat_kind(reader)
        callers = Callers(self._keys, self._settings)
        shared = (self._admission, callers, metrics, self._settings)
        routes: list[PostRoute] = [
            CompletionRoute(completion, self._answers, "/v1/completions", *shared),
            CompletionRoute(chat, self._answers, "/v1/chat/completions", *shared),
            *token_routes(self._catalog, *shared),
        ]
        whole = partial(whole_response, completion)
        by_path = {route.path: route for route in routes}
        cluster = Cluster(self._placements, self._queue, self._catalog)
        more = [cluster_route(cluster, callers, self._settings.id, self._active)]
        return HttpApp(by_path, self._answers, whole, callers, self._catalog, self._readiness, metrics, more)

    def _asgi_app(self, metrics: Metrics) -> AsgiApp:
        app, origins = self._http_app(metrics), self._settings.cors_origins
        return Cors(app, origins) if origins else app

    async def start(self) -> tuple[int, int]:
        """Opens both fronts, not ready yet. Returns the HTTP and the gRPC port. Raises OSError."""
        http_port = await self._http.start()
        grpc_port = await self._grpc.start(host_port(self._settings.host, self._settings.grpc_port))
        return http_port, grpc_port

    async def run(self, stop: Stop) -> None:
        """Serves until `stop` is set, then drains and closes. Raises UnfitRedis."""
        parts = (
            self._placements.run(self._answers.offered),
            self._workers.run(),
            self._catalog.run(),
            self._leases.run(),
            self._keys.run(),
            self._limits.run(),
            self._costs.run(),
            self._stats.run(),
            self._readiness.follow(self._tell_readiness),
        )
        background = [asyncio.create_task(part) for part in parts]
        stopping = asyncio.create_task(stop.wait())
        # None of the parts returns by itself: one that is done has failed.
        await asyncio.wait([stopping, *background], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await self._drain()
        failures = [task.exception() for task in background if task.done()]
        await self._close([stopping, *background])
        for failure in failures:
            if failure is not None:
                raise failure

    async def _tell_readiness(self, problem: str | None) -> None:
        log.info("ready for requests" if problem is None else f"not ready: {problem}")
        await self._grpc.set_serving(problem is None)

    async def _drain(self) -> None:
        """Lets running requests finish, and ends those that do not in time with an error."""
        self._readiness.drain()
        await self._grpc.set_serving(False)
        await asyncio.sleep(self._settings.drain_settle_s)
        self._admission.close()
        # Connections are told that they take no new calls, which proxies then send elsewhere by themselves.
        closing = asyncio.create_task(self._grpc.stop(self._settings.drain_grace_s + _LAST_WORDS_S))
        if not await self._active.wait_empty(self._settings.drain_grace_s):
            log.warning("%d requests did not finish in time", len(self._active))
            for active in self._active:
                self._give_up(active)
            await self._active.wait_empty(_LAST_WORDS_S)
        await asyncio.gather(self._grpc.stop(_LAST_WORDS_S), closing)

    def _give_up(self, active: ActiveRequest) -> None:
        if active.journal is None:
            active.fail(Unavailable("The gateway shut down before this request finished."))
        else:
            active.abandon(Unavailable("This gateway shuts down: continue this answer from its last event on another."))

    async def _close(self, background: list["asyncio.Task[Any]"]) -> None:
        await asyncio.gather(self._http.stop(), self._grpc.stop(_LAST_WORDS_S))
        await asyncio.gather(
            self._leases.wait_ended(_LAST_WORDS_S),
            self._limits.wait_settled(_LAST_WORDS_S),
            self._costs.wait_written(_LAST_WORDS_S),
        )
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await self._answers.close()
        with contextlib.suppress(Unavailable):
            await self._queue.retire()
        await self._queue.close()
