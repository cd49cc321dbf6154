"""The way between a real Redis and a dispatcher of which the test says how much room it has."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import PRIORITY_HIGH, PRIORITY_LOW, PRIORITY_NORMAL, Priority
from services.common.redis.keys import Owner
from services.common.redis.queue import JobQueue, QueuedJob
from services.scheduler.dispatch import Dispatcher
from services.scheduler.intake import Intake
from services.scheduler.metrics import SchedulerMetrics
from tests.redis_server import RedisServer

MODEL = "m"


class Room:
    """A dispatcher that holds what it gets and places nothing."""

    def __init__(self, room: int) -> None:
        self.left = room
        self.has_room, self.has_no_room = asyncio.Event(), asyncio.Event()
        self.held: list[QueuedJob] = []
        self.news = asyncio.Event()
        self.wake()

    def room(self, most: int) -> int:
        return min(most, max(0, self.left - len(self.held)))

    def set(self, room: int) -> None:
        self.left = room
        self.wake()

    def wake(self) -> None:
        now_set, now_clear = (self.has_room, self.has_no_room)[:: 1 if self.room(1) else -1]
        now_set.set()
        now_clear.clear()

    def hold(self, jobs: list[QueuedJob]) -> None:
        self.held += jobs
        self.news.set()
        self.wake()

    async def until_held(self, count: int) -> list[str]:
        async with asyncio.timeout(20):
            while len(self.held) < count:
                self.news.clear()
                await self.news.wait()
        return [queued.job.request_id for queued in self.held]

    def __getattr__(self, name: str) -> Any:
        return lambda *_: []


class Bench:
    """One scheduler's intake."""

    def __init__(self, redis_url: str, scheduler_id: str, room: int) -> None:
        self.queue = JobQueue(redis_url, Owner("scheduler", scheduler_id, "1"))
        self.dispatcher = Room(room)
        dispatcher: Dispatcher = self.dispatcher  # type: ignore[assignment]
        self.intake = Intake(MODEL, self.queue, dispatcher, SchedulerMetrics(CollectorRegistry()), interval_s=60)
        self.intake.start()

    async def stop(self) -> None:
        await self.intake.stop()
        await self.queue.close()


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[JobQueue]:
    queue = JobQueue(redis_url, Owner("gateway", "g", "1"))
    yield queue
    await queue.close()


async def add(gateway: JobQueue, name: str, priority: Priority.ValueType = PRIORITY_NORMAL) -> None:
    await gateway.enqueue(Job(request_id=name, model=MODEL, priority=priority))


async def blocked(gateway: JobQueue, clients: int = 1) -> None:
    """Returns when so many schedulers wait for a job."""
    async with asyncio.timeout(20):
        while (await gateway.redis.command("INFO", "clients"))["blocked_clients"] != clients:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_jobs_come_by_rank_and_then_as_they_are_added(redis_url: str, gateway: JobQueue) -> None:
    for priority in (PRIORITY_LOW, PRIORITY_HIGH, PRIORITY_NORMAL):
        await add(gateway, Priority.Name(priority), priority)
    bench = Bench(redis_url, "s", 100)
    assert await bench.dispatcher.until_held(3) == ["PRIORITY_HIGH", "PRIORITY_NORMAL", "PRIORITY_LOW"]
    for number in range(4, 50):
        await add(gateway, str(number))
        assert (await bench.dispatcher.until_held(number))[-1] == str(number)
    await bench.stop()


async def test_a_wait_ends_with_the_room_so_that_another_scheduler_gets_the_job(
    redis_url: str, gateway: JobQueue
) -> None:
    full = Bench(redis_url, "full", 1)
    await blocked(gateway)
    free = Bench(redis_url, "free", 1)
    await blocked(gateway, 2)
    full.dispatcher.set(0)
    await blocked(gateway, 1)
    await add(gateway, "a")
    assert await free.dispatcher.until_held(1) == ["a"]
    full.dispatcher.set(1)
    await blocked(gateway, 1)
    await add(gateway, "b")
    assert await full.dispatcher.until_held(1) == ["b"]
    await full.stop()
    await free.stop()


async def test_stopping_leaves_no_job_on_its_way(redis_url: str, gateway: JobQueue) -> None:
    for number in range(20):
        bench = Bench(redis_url, f"s{number}", 10)
        if number % 2:
            await blocked(gateway)
        await asyncio.gather(add(gateway, str(number)), bench.intake.stop())
        await bench.intake.stop()  # again, as `Models` does
        rest = JobQueue(redis_url, Owner("scheduler", f"rest{number}", "1"))
        taken = [*bench.dispatcher.held, *await rest.pop(MODEL, 10)]
        assert [queued.job.request_id for queued in taken] == [str(number)]
        await bench.queue.close()
        await rest.close()


async def test_a_wait_that_breaks_off_is_begun_again(
    redis_server: RedisServer, redis_url: str, gateway: JobQueue
) -> None:
    bench = Bench(redis_url, "s", 100)
    await add(gateway, "a")
    await bench.dispatcher.until_held(1)
    await blocked(gateway)
    await gateway.redis.command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
    await add(gateway, "b")
    assert await bench.dispatcher.until_held(2) == ["a", "b"]
    await blocked(gateway)
    redis_server.flush()
    await add(gateway, "c")
    assert await bench.dispatcher.until_held(3) == ["a", "b", "c"]
    await bench.stop()
