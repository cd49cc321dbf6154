"""What a worker tells of the time that it spent: all of it, once, however a sequence ends."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from headrace.v1.scheduler_pb2 import KvSource
from headrace.v1.worker_pb2 import SequenceTime
from tests.services.worker.stack import BLOCK_SIZE, Ended, Gateway, Stack

PROMPT = [(7 * position) % 31 for position in range(30)]


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    stack = Stack(price_per_hour=0.5)
    await stack.start()
    yield stack
    await stack.stop()
    await stack.close()


def seconds(stack: Stack, use: str) -> float:
    return stack.metric("headrace_worker_seconds_total", model_name="tiny", use=use)


def spent(*times: SequenceTime) -> tuple[float, float]:
    """Seconds of prefill and of decode."""
    return sum(time.time.prefill_ns for time in times) / 1e9, sum(time.time.decode_ns for time in times) / 1e9


async def check_all_told(stack: Stack, *times: SequenceTime) -> None:
    await stack.idle()
    assert spent(*times) == pytest.approx((seconds(stack, "prefill"), seconds(stack, "decode")), abs=1e-8)


async def test_a_stream_begins_with_the_price(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1], [3, 4])
    await gateway.finish(1)
    first, *others = gateway.outputs
    assert first.price_per_hour == 0.5
    assert not any(output.HasField("price_per_hour") for output in others)
    assert stack.metric("headrace_worker_price_per_hour", model_name="tiny") == 0.5
    assert stack.scheduler.registrations[0].price_per_hour == 0.5


async def test_sequences_that_run_together_add_up_to_the_steps(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1, 2], PROMPT, max_tokens=20)
    gateway.start("r2", [3], [3, 4], max_tokens=30)
    await gateway.told(1, 2, 3)
    assert all(time.time.prefill_ns > 0 and time.time.decode_ns > 0 for time in gateway.times.values())
    await check_all_told(stack, *gateway.times.values())
    assert seconds(stack, "idle") > 0 == seconds(stack, "failed")


async def test_what_a_prefix_hit_saves_is_what_its_tokens_took_others(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1], PROMPT)
    await gateway.told(1)
    assert gateway.times[1].time.saved_prefix_ns == 0
    gateway.start("r2", [2], PROMPT)
    await gateway.told(2)
    cached = gateway.cached[2]
    assert cached == len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
    prefill_s, _ = spent(*gateway.times.values())
    computed = 2 * len(PROMPT) - cached
    assert gateway.times[2].time.saved_prefix_ns == pytest.approx(prefill_s * 1e9 * cached / computed, abs=2)


async def test_a_cancelled_sequence_is_told_of_when_the_engine_has_let_go(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.hold(after=4)
    gateway.start("r1", [1], [3, 4], max_tokens=100)
    await gateway.until(lambda: len(gateway.tokens.get(1, ())) >= 2)
    gateway.cancel(1)
    await gateway.finish(1)
    assert 1 not in gateway.times
    stack.release()
    await gateway.told(1)
    await check_all_told(stack, gateway.times[1])


async def test_what_never_ran_took_nothing(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    gateway.start("r1", [1, 2, 3, 4, 5], [3])  # more choices than the worker takes
    gateway.start("r2", [6], [3], max_tokens=0)
    await gateway.told(1, 2, 3, 4, 5, 6)
    assert all(not time.HasField("time") for time in gateway.times.values())


async def test_a_failed_step_is_nobodys(stack: Stack) -> None:
    gateway = Gateway(stack.channel)
    stack.runner.fail_next = RuntimeError("no")
    gateway.start("r1", [1], [3])
    await gateway.told(1)
    assert gateway.ended[1].outcome == Ended.OUTCOME_FAILED
    await check_all_told(stack, gateway.times[1])
    assert seconds(stack, "failed") > 0 == seconds(stack, "prefill")


async def test_a_worker_that_ends_tells_of_what_it_hands_on() -> None:
    stack = Stack()
    await stack.start()
    gateway = Gateway(stack.channel)
    stack.hold(after=3)
    gateway.start("r1", [1], [3, 4], max_tokens=190)
    await gateway.until(lambda: len(gateway.tokens.get(1, [])) > 1)  # the first is the prompt's
    stopping = asyncio.create_task(stack.stop())
    await gateway.finish(1)
    assert gateway.ended[1].outcome == Ended.OUTCOME_DRAINING
    stack.release()
    await gateway.told(1)
    assert await gateway.call.read() is grpc.aio.EOF
    await stopping
    assert min(spent(gateway.times[1])) > 0
    await stack.close()


async def test_a_prefill_elsewhere_comes_with_its_price(stack: Stack) -> None:
    prefiller = Stack(price_per_hour=2.0)
    await prefiller.start()
    gateway = Gateway(stack.channel)
    source = KvSource(kind=KvSource.KIND_PREFILL, address=prefiller.address, blocks=(len(PROMPT) - 1) // BLOCK_SIZE)
    gateway.start("r1", [1, 2], PROMPT, sources=[source])
    await gateway.told(1, 2)
    assert not gateway.times[2].elsewhere
    [elsewhere] = gateway.times[1].elsewhere
    assert elsewhere.price_per_hour == 2.0
    await prefiller.idle()
    assert elsewhere.time.prefill_ns / 1e9 == pytest.approx(seconds(prefiller, "prefill"), abs=1e-8)
    assert gateway.times[1].time.saved_prefix_ns == 0
    await check_all_told(stack, *gateway.times.values())
    await prefiller.stop()
    await prefiller.close()
