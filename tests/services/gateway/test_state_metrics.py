"""What an operator sees of a gateway's refusals, reservations and leases."""

import asyncio

import grpc.aio
import pytest

from headrace.v1.inference_pb2 import GenerateRequest
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import Stack, eventually, running_stack


async def test_what_unfinished_requests_hold_is_shown_until_it_is_settled(redis_url: str) -> None:
    async with running_stack(redis_url) as stack:
        key = await make_key(stack.redis, tokens_per_minute=200, concurrent=5)
        stack.workers[0].go.clear()
        running = asyncio.create_task(key.complete(stack, [5, 6, 7]))
        await stack.workers[0].started.wait()
        assert held(stack) == [1, 103, 1, 1]
        assert stack.sample("headrace_leases", state="waiting") == 0
        stack.workers[0].go.set()
        assert (await running).status_code == 200

        async def settled() -> bool:
            return held(stack) == [0, 0, 0, 0]

        await eventually(settled)
        assert stack.sample("headrace_redis_reachable") == 1


def held(stack: Stack) -> list[float]:
    return [
        stack.sample("headrace_budget_reservations"),
        stack.sample("headrace_budget_reserved", limit="tokens_per_minute"),
        stack.sample("headrace_budget_reserved", limit="concurrent"),
        stack.sample("headrace_leases", state="owned"),
    ]


async def test_refusals_are_counted_by_reason_over_http_and_grpc(redis_url: str) -> None:
    async with running_stack(redis_url, max_requests=1) as stack:
        key = await make_key(stack.redis, requests_per_minute=1)
        assert [(await key.complete(stack)).status_code for _ in range(2)] == [200, 429]
        stack.workers[0].go.clear()
        running = asyncio.create_task(stack.complete())
        await eventually(lambda: full(stack))
        assert (await stack.complete()).status_code == 429
        with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
            await anext(aiter(stack.inference.Generate(GenerateRequest(model=MODEL, text="x"))))
        stack.workers[0].go.set()
        await running
        assert stack.sample("headrace_shed_total", reason="rate_limit") == 1
        assert stack.sample("headrace_shed_total", reason="queue_full") == 2


async def full(stack: Stack) -> bool:
    return stack.sample("llm_active_requests", model=MODEL) == 1
