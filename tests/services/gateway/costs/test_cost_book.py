"""What requests cost, by calls to a real gateway on a real Redis."""

import asyncio
from datetime import UTC, datetime

import httpx
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from headrace.v1.machine_time_pb2 import MachineTime
from headrace.v1.sampling_pb2 import Stopping
from services.common.machine_costs import MachineCosts
from services.common.redis.costs import CostKey, CostStore
from tests.services.gateway.fakes import MODEL, FakeWorker, says
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack

# At 3600 an hour a second costs 1.
TIME = MachineTime(prefill_ns=250_000_000, decode_ns=500_000_000, saved_prefix_ns=125_000_000)
COST = 0.75


def worker(price_per_hour: float | None = 3600.0) -> FakeWorker:
    return FakeWorker("w0", says(TEXT), price_per_hour=price_per_hour, time=TIME, cached_prompt_tokens=2)


async def kept(stack: Stack) -> dict[CostKey, MachineCosts]:
    return await CostStore(stack.redis).of_day(datetime.now(UTC).date())


async def test_answers_tell_what_they_cost(redis_url: str) -> None:
    async with running_stack(redis_url, [worker()]) as stack:
        assert (await stack.complete()).json()["usage"]["cost"] == COST
        assert (await stack.complete(n=2)).json()["usage"]["cost"] == 2 * COST
        assert (await stack.complete(["one", "two", "three"])).json()["usage"]["cost"] == 3 * COST
        streamed = await stack.complete(stream=True, stream_options={"include_usage": True})
        assert f'"cost":{COST}' in streamed.text
        request = GenerateRequest(model=MODEL, text="hello", stopping=Stopping(max_tokens=5))
        deltas = [delta async for delta in stack.inference.Generate(request)]
        assert deltas[-1].usage.cost == COST


async def test_without_a_price_time_is_counted_and_no_money_told(redis_url: str) -> None:
    async with running_stack(redis_url, [worker(None)]) as stack:
        answer = await stack.complete(stop="quick")
        assert "cost" not in answer.json()["usage"]
        await eventually(lambda: counted(stack, 1))
        assert stack.sample("headrace_machine_seconds_total", model=MODEL, phase="decode") == 0.5
        assert stack.sample("headrace_cost_total", model=MODEL, phase="decode") == 0


async def counted(stack: Stack, requests: int) -> bool:
    return sum(costs.requests for costs in (await kept(stack)).values()) == requests


async def test_a_stop_string_waits_for_what_its_sequence_took(redis_url: str) -> None:
    async with running_stack(redis_url, [worker()]) as stack:
        answer = (await stack.complete(stop="quick")).json()
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["cost"]) == ("stop", COST)


async def test_costs_are_kept_by_key_and_a_cancelled_request_has_some(redis_url: str) -> None:
    async with running_stack(redis_url, [worker()]) as stack:
        one, other = await make_key(stack.redis), await make_key(stack.redis)
        await one.complete(stack, [5, 6, 7])
        await one.complete(stack, [5, 6, 7])
        stack.workers[0].go.clear()
        stack.workers[0].started.clear()
        cancelled = asyncio.create_task(other.complete(stack, [5, 6, 7]))
        await stack.workers[0].started.wait()
        cancelled.cancel()
        with pytest.raises((asyncio.CancelledError, httpx.HTTPError)):
            await cancelled
        await stack.workers[0].cancelled.wait()
        stack.workers[0].let_go()
        await eventually(lambda: counted(stack, 3))
        costs = await kept(stack)
        assert costs[CostKey(one.key.id, MODEL)].nanos == 2 * COST * 10**9
        assert costs[CostKey(one.key.id, MODEL)].saved_prefix_nanos == 0.25 * 10**9
        assert costs[CostKey(one.key.id, MODEL)].cached_prompt_tokens == 4
        assert costs[CostKey(other.key.id, MODEL)].nanos == COST * 10**9
        assert stack.sample("headrace_cost_total", model=MODEL, phase="prefill") == 0.75
        assert stack.sample("headrace_cost_total", model=MODEL, phase="decode") == 1.5
        assert stack.sample("headrace_cost_saved_total", model=MODEL, reason="prefix") == 0.375


async def test_a_drained_gateway_has_written_all(redis_url: str) -> None:
    async with running_stack(redis_url, [worker()]) as stack:
        await stack.complete()
        stack.stop.set()
        await stack.task
        assert await counted(stack, 1)
