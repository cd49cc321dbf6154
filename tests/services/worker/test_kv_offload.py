"""What a worker gives to a cache service to keep: what is used twice at once, long prompts when it is idle."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from headrace.v1 import cache_pb2
from services.common.block_hash import chain_hashes, chain_root
from services.common.kv_blocks import BlockAssembler
from services.worker import kv_offload
from tests.services.worker.stack import BLOCK_SIZE, Gateway, RecordingCache, Stack

PROMPT = [(7 * position) % 31 for position in range(30)]
NAMES = chain_hashes(chain_root("tiny", BLOCK_SIZE, ""), PROMPT, BLOCK_SIZE)


class KeepingCache(RecordingCache):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[bytes, bytes] = {}
        self.stores = self.lookups = 0
        self.refuses = False

    async def Lookup(self, request: Any, context: Any) -> cache_pb2.LookupResponse:
        self.lookups += 1
        names = [request.block_hashes[at : at + 16] for at in range(0, len(request.block_hashes), 16)]
        kept = next((count for count, name in enumerate(names) if name not in self.kept), len(names))
        holder = cache_pb2.Holder(id="cache", kind=cache_pb2.Holder.KIND_CACHE)
        peer = cache_pb2.Holder(id="peer", kind=cache_pb2.Holder.KIND_WORKER)
        match = cache_pb2.LookupResponse.Match
        return cache_pb2.LookupResponse(
            matches=[match(holder=peer, blocks=len(names)), match(holder=holder, blocks=kept)]
        )

    async def Store(self, request_iterator: Any, context: Any) -> cache_pb2.StoreResponse:
        self.stores += 1
        self._news.set()
        if self.refuses:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        assembler = BlockAssembler(1 << 20, "format")
        answer = cache_pb2.StoreResponse()
        async for chunk in request_iterator:
            if (block := assembler.take(chunk)) is not None:
                self.kept[block.name] = bytes(block.data)
                answer.stored_blocks += 1
                answer.stored_bytes += len(block.data)
                self._news.set()
        return answer


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    stack = Stack(KeepingCache(), kv_offload_least_tokens=20)
    await stack.start()
    yield stack
    await stack.stop()
    await stack.close()


def cache_of(stack: Stack) -> KeepingCache:
    assert isinstance(stack.cache, KeepingCache)
    return stack.cache


async def run(stack: Stack, prompt: list[int], max_tokens: int = 8, request: str = "r") -> None:
    gateway = Gateway(stack.channel)
    gateway.start(request, [1], prompt, max_tokens)
    await gateway.finish(1)


async def test_a_long_prompt_and_its_answer_are_kept_once_the_engine_is_idle(stack: Stack) -> None:
    cache = cache_of(stack)
    await run(stack, PROMPT)
    whole = PROMPT + stack.expected(PROMPT)
    names = chain_hashes(chain_root("tiny", BLOCK_SIZE, ""), whole[:-1], BLOCK_SIZE)
    await cache.until(lambda: cache.kept.keys() >= set(names))
    assert list(cache.kept) == names, "nothing else, head first"
    held = stack.service._engine.exchange.hold(names)
    assert [bytes(stack.service._engine.exchange.read(block.block)) for block in held] == list(cache.kept.values())


async def test_a_long_prompt_waits_for_a_moment_without_work(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_offload, "_REST_S", 3600.0)
    cache = cache_of(stack)
    await run(stack, PROMPT, max_tokens=1, request="first")
    await run(stack, PROMPT[::-1], max_tokens=1, request="second")
    assert not cache.stores
    monkeypatch.setattr(kv_offload, "_REST_S", 0.0)
    await run(stack, [5], max_tokens=1, request="third")  # after which it rests no longer
    await cache.until(lambda: cache.stores == 2)


async def test_what_is_kept_is_not_sent_again(stack: Stack) -> None:
    cache = cache_of(stack)
    await run(stack, PROMPT, max_tokens=1)
    await stack.until_metric(7, "headrace_kv_offloaded_blocks_total")
    await run(stack, [*PROMPT, 3, 3, 3, 3], max_tokens=1, request="second")
    await stack.until_metric(8, "headrace_kv_offloaded_blocks_total")
    assert cache.stores == 2


async def test_a_short_prompt_is_kept_when_it_is_used_twice(stack: Stack) -> None:
    cache = cache_of(stack)
    await run(stack, PROMPT[:9], request="first")
    assert not cache.kept
    await run(stack, PROMPT[:9], request="second")
    await cache.until(lambda: list(cache.kept) == NAMES[:2])


async def share_and_stop_after_its_step(stack: Stack, prompt: list[int]) -> None:
    """Two requests: the second one's prompt is computed, and nothing after it until `release`."""
    await run(stack, prompt, request="first")
    stack.hold(after=1)
    gateway = Gateway(stack.channel)
    gateway.start("second", [2], prompt, max_tokens=8)
    await gateway.until(lambda: 2 in gateway.tokens)


async def test_what_is_shared_waits_for_a_step_without_prompts(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_offload, "_PATIENCE_S", 3600.0)
    cache = cache_of(stack)
    await share_and_stop_after_its_step(stack, PROMPT[:9])
    await cache.until(lambda: cache.stores == 1)
    for _ in range(20):  # in which time what is sent would arrive
        await stack.health()
    assert not cache.kept
    stack.release()
    await cache.until(lambda: list(cache.kept) == NAMES[:2])


async def test_what_is_shared_is_kept_though_every_step_computes_prompts(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_offload, "_PATIENCE_S", 0.01)
    cache = cache_of(stack)
    await share_and_stop_after_its_step(stack, PROMPT[:9])
    await cache.until(lambda: list(cache.kept) == NAMES[:2])
    stack.release()


async def test_what_is_shared_is_sent_in_turns_if_it_takes_long(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_REST_S": 3600.0, "_PATIENCE_S": 0.02, "_TURN_S": 0.03, "_BLOCKS_AT_ONCE": 1}.items():
        monkeypatch.setattr(kv_offload, name, value)
    cache = cache_of(stack)
    await share_and_stop_after_its_step(stack, PROMPT)
    await cache.until(lambda: list(cache.kept) == NAMES)
    assert cache.stores > 1
    stack.release()


async def test_a_prompt_that_many_share_is_asked_for_once(stack: Stack) -> None:
    cache = cache_of(stack)
    for request in ("first", "second"):
        await run(stack, PROMPT[:9], request=request)
    await stack.until_metric(2, "headrace_kv_offloaded_blocks_total")
    for request in ("third", "fourth"):
        await run(stack, PROMPT[:9], request=request)
    await run(stack, PROMPT, max_tokens=1, request="long")  # comes after them in the same queue
    await stack.until_metric(7, "headrace_kv_offloaded_blocks_total")
    assert cache.lookups == 2


async def test_a_long_prompt_waits_while_the_engine_works_and_a_shared_one_does_not(stack: Stack) -> None:
    cache = cache_of(stack)
    stack.hold(after=1)
    gateway = Gateway(stack.channel)
    gateway.start("busy", [1], [5], max_tokens=190)
    await gateway.until(lambda: 1 in gateway.tokens)
    commands = stack.commands
    gateway.start("long", [2], PROMPT[::-1], max_tokens=1)
    gateway.start("first", [3], PROMPT[:9], max_tokens=1)
    await stack.until_commands(commands + 2)
    stack.hold(after=20)
    await gateway.finish(2, 3)
    gateway.start("second", [4], PROMPT[:9], max_tokens=1)
    await stack.until_commands(commands + 3)
    stack.hold(after=20)
    await gateway.finish(4)
    await cache.until(lambda: list(cache.kept) == NAMES[:2])
    stack.release()
    gateway.cancel(1)
    await cache.until(lambda: len(cache.kept) > 2)


async def test_a_cache_service_that_keeps_nothing_costs_nothing(stack: Stack) -> None:
    cache = cache_of(stack)
    cache.refuses = True
    await run(stack, PROMPT)
    await stack.until_metric(1, "headrace_kv_offload_failures_total", reason="resource_exhausted")
    await run(stack, PROMPT, request="second")
    await stack.idle()
