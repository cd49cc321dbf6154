"""A real gateway in this process between a real Redis and fakes, and clients of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import httpx
from prometheus_client import CollectorRegistry

from headrace.v1.inference_pb2_grpc import InferenceStub
from services.common.channel import dial
from services.common.metrics_switch import NoMetrics
from services.common.redis.client import RedisClient
from services.common.redis.keys import queue_streams
from services.gateway.config import GatewaySettings
from services.gateway.gateway import Gateway
from tests.services.gateway.fakes import MODEL, FakeScheduler, FakeWorker, says

TEXT = "Once upon a time the quick brown fox 🦊 jumps over the lazy dog. Zürich, 東京."


@dataclass
class Stack:
    """What a test works with."""

    gateway: Gateway
    scheduler: FakeScheduler
    workers: list[FakeWorker]
    http: httpx.AsyncClient
    base_url: str
    grpc_address: str
    inference: InferenceStub
    redis: RedisClient
    registry: CollectorRegistry
    stop: asyncio.Event
    task: "asyncio.Task[None]"

    async def complete(self, prompt: object = "hello", **fields: object) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 100, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def entries(self) -> int:
        """Entries that the queue still has."""
        return sum([await self.redis.command("XLEN", stream) for stream in queue_streams(MODEL)])

    async def settled(self) -> None:
        """Returns once nothing is left in the queue."""

        async def empty() -> bool:
            return await self.entries() == 0

        await eventually(empty)

    async def held(self, state: str) -> None:
        """Returns once the gateway holds an entry in that state."""

        async def there() -> bool:
            return self.sample("headrace_leases", state=state) > 0

        await eventually(there)

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def running_stack(
    redis_url: str, workers: list[FakeWorker] | None = None, **settings: object
) -> AsyncIterator[Stack]:
    """Everything up and the gateway ready."""
    workers = [FakeWorker("w0", says(TEXT))] if workers is None else workers
    scheduler = FakeScheduler(redis_url, workers)
    for worker in workers:
        await worker.serve()
    await scheduler.serve()
    try:
        async with running_gateway(redis_url, scheduler, workers, **settings) as stack:
            yield stack
    finally:
        await scheduler.stop()
        for worker in workers:
            await worker.stop()


@contextlib.asynccontextmanager
async def running_gateway(
    redis_url: str, scheduler: FakeScheduler, workers: list[FakeWorker], **settings: object
) -> AsyncIterator[Stack]:
    """A ready gateway of a scheduler and workers that run already."""
    fields: dict[str, object] = {
        "http_port": 0,
        "grpc_port": 0,
        "redis_url": redis_url,
        "schedulers": [scheduler.address],
        "drain_grace_s": 0.5,
    }
    registry = CollectorRegistry() if settings.get("metrics", True) else NoMetrics()
    gateway = Gateway(GatewaySettings.model_validate(fields | settings), registry)
    http_port, grpc_port = await gateway.start()
    stop = asyncio.Event()
    task = asyncio.create_task(gateway.run(stop))
    base_url, grpc_address = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
    redis = RedisClient(redis_url)
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as http, dial(grpc_address) as channel:
        inference = InferenceStub(channel)
        stack = Stack(gateway, scheduler, workers, http, base_url, grpc_address, inference, redis, registry, stop, task)
        try:
            await until_ready(http)
            yield stack
        finally:
            stop.set()
            await task
            await redis.close()


async def until_ready(http: httpx.AsyncClient) -> None:
    async def ready() -> bool:
        return (await http.get("/health/ready")).status_code == 200

    await eventually(ready)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns once the condition holds; for what sets no event."""
    async with asyncio.timeout(10):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.01)
