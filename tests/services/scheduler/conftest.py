"""One scheduler, one gateway that is connected to it, and one worker with eight credits."""

from collections.abc import AsyncIterator

import pytest

from tests.services.scheduler.fakes import FakeGateway, FakeWorker, RunningScheduler, running_scheduler


@pytest.fixture
async def scheduler(redis_url: str) -> AsyncIterator[RunningScheduler]:
    async with running_scheduler(redis_url) as scheduler:
        yield scheduler


@pytest.fixture
async def gateway(redis_url: str, scheduler: RunningScheduler) -> AsyncIterator[FakeGateway]:
    gateway = FakeGateway(redis_url)
    await gateway.connect(scheduler)
    yield gateway
    await gateway.close()


@pytest.fixture
async def worker(scheduler: RunningScheduler) -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(scheduler)
    worker.grant(8)
    yield worker
    await worker.leave()
