"""A real gateway and a real scheduler between workers that fail as the test says: who is cut off, and who is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client import CollectorRegistry

from headrace.v1.scheduler_pb2 import (
    Credits,
    DescribeFleetRequest,
    FleetWorker,
    ModelInfo,
    Registration,
    WorkerReport,
    WorkerState,
)
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from headrace.v1.worker_pb2 import SequenceEnded, Start
from services.common.channel import cancel_and_wait, dial
from services.common.tokenizer_hash import bundle_hash
from services.gateway.config import GatewaySettings
from services.gateway.gateway import Gateway
from tests.services.gateway.fakes import BLOCK_SIZE, CONTEXT, MODEL, FakeWorker, Running, says, unpack
from tests.services.gateway.stack import eventually, until_ready
from tests.services.gateway.tokenizers_for_tests import bundle, byte_level_tokenizer
from tests.services.scheduler.fakes import RunningScheduler, running_scheduler

DEADLY = "kill"


class BrittleWorker(FakeWorker):
    """Its engine fails at a deadly prompt, and whatever runs beside it fails as well."""

    def _take(self, start: Start, running: dict[int, Running], ended: list[SequenceEnded]) -> None:
        if byte_level_tokenizer().decode(unpack(start.prompt_ids)) != DEADLY:
            super()._take(start, running, ended)
            return
        self.starts.append(start)
        handles = [*running, *(choice.handle for choice in start.choices)]
        ended += [SequenceEnded(handle=handle, outcome=SequenceEnded.OUTCOME_FAILED) for handle in handles]
        running.clear()


async def reports(worker: FakeWorker) -> AsyncIterator[WorkerReport]:
    """It is always idle, and says so often."""
    model = ModelInfo(
        name=MODEL, max_context_tokens=CONTEXT, block_size=BLOCK_SIZE, tokenizer_hash=bundle_hash(bundle())
    )
    model.vocabulary_size = byte_level_tokenizer().get_vocab_size()
    registration = Registration(worker_id=worker.id, incarnation="1", address=worker.address, model=model)
    registration.max_sequences, registration.total_blocks, registration.kv_format = 8, 1000, "f"
    yield WorkerReport(registration=registration)
    while True:
        credits = Credits(sequences=8, blocks=1000, prefill_tokens=1000)
        yield WorkerReport(state=WorkerState(credits=credits, free_blocks=1000))
        await asyncio.sleep(0.05)


async def register(worker: FakeWorker, scheduler: str) -> None:
    async with dial(scheduler) as channel:
        async for _ in SchedulerStub(channel).Register(reports(worker)):
            pass


@asynccontextmanager
async def serving(
    redis_url: str, workers: list[FakeWorker]
) -> AsyncIterator[tuple[RunningScheduler, httpx.AsyncClient]]:
    """One failure opens a breaker, and for long."""
    breakers = {"breaker_failures": 1, "breaker_backoff_s": 600, "breaker_longest_backoff_s": 600}
    async with running_scheduler(redis_url, placement_timeout_s=0.1, **breakers) as scheduler:
        for worker in workers:
            await worker.serve()
        registered = [asyncio.create_task(register(worker, scheduler.address)) for worker in workers]
        settings = {"http_port": 0, "grpc_port": 0, "redis_url": redis_url, "schedulers": [scheduler.address]}
        gateway = Gateway(GatewaySettings.model_validate(settings), CollectorRegistry())
        http_port, _ = await gateway.start()
        stop = asyncio.Event()
        running = asyncio.create_task(gateway.run(stop))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=30) as http:
            await until_ready(http)
            await until(scheduler, "healthy", len(workers))
            yield scheduler, http
        stop.set()
        await running
        await cancel_and_wait(registered)
        for worker in workers:
            await worker.stop()


async def until(scheduler: RunningScheduler, condition: str, workers: int) -> None:
    await scheduler.until_metric(workers, "headrace_workers", model=MODEL, state=condition)


async def ask(http: httpx.AsyncClient, prompt: str = "hello") -> httpx.Response:
    return await http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 20})


async def test_a_worker_whose_engine_fails_is_cut_off_and_no_caller_sees_it(redis_url: str) -> None:
    broken = FakeWorker("w0", says("x"), error=SequenceEnded(outcome=SequenceEnded.OUTCOME_FAILED, error="broken"))
    async with serving(redis_url, [broken, FakeWorker("w1", says("fine"))]) as (scheduler, http):

        async def has_failed() -> bool:
            assert (await ask(http)).json()["choices"][0]["text"] == "fine"
            return bool(broken.starts)

        await eventually(has_failed)
        await until(scheduler, "breaker_open", 1)
        tried = len(broken.starts)
        for answer in await asyncio.gather(*(ask(http) for _ in range(10))):
            assert answer.json()["choices"][0]["text"] == "fine"
        assert len(broken.starts) == tried


@pytest.mark.parametrize("prompts", [1, 4])
async def test_deadly_prompts_cut_nobody_off(redis_url: str, prompts: int) -> None:
    workers: list[FakeWorker] = [BrittleWorker(f"w{number}", says("fine")) for number in range(2)]
    async with serving(redis_url, workers) as (scheduler, http):
        for _ in range(prompts):
            answer = await ask(http, DEADLY)
            assert answer.status_code == 500
            assert "failed on 3 workers" in answer.json()["error"]["message"]
        assert sum(len(worker.starts) for worker in workers) == 3 * prompts
        assert (await ask(http)).json()["choices"][0]["text"] == "fine"
        # Its acceptance comes after whatever was reported of the others.
        await scheduler.until_metric(3 * prompts + 1, "headrace_offers_total", answer="accepted")
        async with dial(scheduler.address) as channel:
            fleet = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest())
        assert [worker.condition for worker in fleet.workers] == [FleetWorker.CONDITION_HEALTHY] * 2
