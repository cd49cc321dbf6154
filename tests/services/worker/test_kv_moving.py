"""KV that moves between workers: the same tokens, computed once, whatever the other side does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import pytest

from headrace.v1 import cache_pb2, worker_pb2, worker_pb2_grpc
from headrace.v1.scheduler_pb2 import KvSource
from services.common.block_digest import digest
from services.common.block_hash import chain_hashes, chain_root
from services.common.serve import GrpcServer, Registration
from tests.services.worker.stack import BLOCK_SIZE, NUM_BLOCKS, Gateway, Stack, pack

PROMPT = [(7 * position) % 31 for position in range(30)]
BLOCKS = 7  # full ones before the last token
NAMES = chain_hashes(chain_root("tiny", BLOCK_SIZE, ""), PROMPT, BLOCK_SIZE)


@pytest.fixture
async def two() -> AsyncIterator[tuple[Stack, Stack]]:
    stacks = (Stack(), Stack())
    for stack in stacks:
        await stack.start()
    yield stacks
    for stack in stacks:
        await stack.stop()
        await stack.close()


async def run(
    stack: Stack, prompt: list[int] = PROMPT, sources: Sequence[KvSource] = (), request: str = "r"
) -> Gateway:
    """Runs a prompt, and checks its tokens."""
    gateway = Gateway(stack.channel)
    gateway.start(request, [1], prompt, sources=sources)
    await gateway.finish(1)
    assert gateway.tokens[1] == stack.expected(prompt)
    return gateway


async def fetch(stack: Stack, names: Sequence[bytes], kv_format: str = "format") -> list[cache_pb2.KvChunk]:
    request = cache_pb2.FetchBlocksRequest(kv_format=kv_format, block_hashes=b"".join(names))
    return [chunk async for chunk in worker_pb2_grpc.WorkerStub(stack.channel).FetchBlocks(request)]


def at(stack: Stack, kind: "KvSource.Kind.ValueType" = KvSource.KIND_WORKER, blocks: int = BLOCKS) -> KvSource:
    return KvSource(kind=kind, address=stack.address, blocks=blocks)


async def test_a_prefix_comes_from_a_peer(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    gateway = await run(worker, sources=[at(peer)])
    assert gateway.cached == {1: BLOCKS * BLOCK_SIZE}
    assert worker.metric("vllm:prompt_tokens_total", model_name="tiny", engine="0") == len(PROMPT) - BLOCKS * BLOCK_SIZE
    assert worker.metric("headrace_kv_imported_blocks_total", source="worker") == BLOCKS
    await asyncio.gather(peer.idle(), worker.idle())


async def test_what_is_here_already_is_not_fetched(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    await run(worker, PROMPT[:17])
    await run(worker, sources=[at(peer)], request="second")
    assert worker.metric("headrace_kv_imported_blocks_total", source="worker") == BLOCKS - 4
    await asyncio.gather(peer.idle(), worker.idle())


async def test_imported_blocks_are_told_with_the_digests_of_their_origin(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    await run(worker, sources=[at(peer)])
    await worker.cache.until(lambda: worker.cache.blocks >= set(NAMES))
    assert [worker.cache.digests[name] for name in NAMES] == [peer.cache.digests[name] for name in NAMES]


async def test_a_prefill_worker_computes_and_the_decoder_does_the_rest(two: tuple[Stack, Stack]) -> None:
    prefiller, worker = two
    gateway = await run(worker, sources=[at(prefiller, KvSource.KIND_PREFILL)])
    assert gateway.cached == {1: 0}, "nothing was cached: it was computed for this request"
    computed = worker.metric("vllm:prompt_tokens_total", model_name="tiny", engine="0")
    assert computed == len(PROMPT) - BLOCKS * BLOCK_SIZE <= 16
    assert worker.metric("headrace_kv_imported_blocks_total", source="prefill") == BLOCKS
    await prefiller.scheduler.until(lambda state: bool(state.settled) or bool(prefiller.scheduler.settled))
    assert prefiller.scheduler.settled == [("r", 1)]
    await asyncio.gather(prefiller.idle(), worker.idle())


async def test_blocks_come_while_the_prefill_worker_still_computes(two: tuple[Stack, Stack]) -> None:
    prefiller, _ = two
    prefiller.hold(after=1)  # a chunk of 16 tokens
    request = worker_pb2.PrefillRequest(request_id="r", attempt=1, kv_format="format", prompt_ids=pack(PROMPT))
    call = worker_pb2_grpc.WorkerStub(prefiller.channel).Prefill(request)
    first = [await call.read() for _ in range(4)]
    assert [chunk.block_hash for chunk in first] == NAMES[:4]
    prefiller.release()
    rest = [await call.read() for _ in range(BLOCKS - 4)]
    assert [chunk.block_hash for chunk in rest] == NAMES[4:BLOCKS]
    await prefiller.idle()


async def test_a_prefill_that_nobody_wants_any_more_is_freed(two: tuple[Stack, Stack]) -> None:
    prefiller, worker = two
    prefiller.hold(after=1)
    gateway = Gateway(worker.channel)
    gateway.start("r", [1], PROMPT, sources=[at(prefiller, KvSource.KIND_PREFILL)])
    await prefiller.scheduler.until(lambda state: state.running_sequences == 1)
    gateway.cancel(1)
    await gateway.finish(1)
    prefiller.release()
    await asyncio.gather(prefiller.idle(), worker.idle())
    assert worker.metric("headrace_cancel_seconds_count", phase="fetch") == 1
    await prefiller.until_metric(1, "headrace_cancel_seconds_count", phase="remote_prefill")


async def test_a_draining_worker_computes_for_nobody_and_hands_out_what_it_has() -> None:
    stack = Stack(drain_grace_s=0.0)
    await stack.start()
    await run(stack)
    stack.hold(after=1)
    stub = worker_pb2_grpc.WorkerStub(stack.channel)
    other = PROMPT[::-1]
    request = worker_pb2.PrefillRequest(request_id="p", attempt=1, kv_format="format", prompt_ids=pack(other))
    running = stub.Prefill(request)
    for _ in range(4):
        await running.read()
    stack.direct(set_draining=True)
    with pytest.raises(grpc.aio.AioRpcError, match="This worker is draining"):
        while await running.read() is not grpc.aio.EOF:
            pass
    stack.release()
    await stack.idle()
    with pytest.raises(grpc.aio.AioRpcError, match="This worker is draining") as refused:
        await stub.Prefill(request).read()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert [chunk.block_hash for chunk in await fetch(stack, NAMES[:BLOCKS])] == NAMES[:BLOCKS]
    await stack.stop()
    await stack.close()


async def test_requests_of_the_same_prompt_fetch_it_once(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    await asyncio.gather(*(run(worker, sources=[at(peer)], request=f"r{number}") for number in range(3)))
    assert worker.metric("headrace_kv_imported_blocks_total", source="worker") == BLOCKS
    await asyncio.gather(peer.idle(), worker.idle())


async def test_a_worker_hands_out_the_leading_run_of_what_it_has(two: tuple[Stack, Stack]) -> None:
    stack, _ = two
    await run(stack)
    chunks = await fetch(stack, [*NAMES[:3], b"x" * 16, *NAMES[3:]])
    assert [(chunk.block_hash, chunk.last) for chunk in chunks] == [(name, True) for name in NAMES[:3]]
    assert all(chunk.digest == digest(chunk.data) for chunk in chunks)
    assert await fetch(stack, [b"x" * 16]) == []
    await stack.idle()


async def test_another_kv_format_is_a_clear_error(two: tuple[Stack, Stack]) -> None:
    stack, _ = two
    stub = worker_pb2_grpc.WorkerStub(stack.channel)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: fetch(stack, NAMES, "other"),
        lambda: stub.Prefill(worker_pb2.PrefillRequest(kv_format="other", prompt_ids=pack(PROMPT))).read(),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call()
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error.value.details() == "This worker's KV format is format, not other."


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (worker_pb2.PrefillRequest(kv_format="format"), "The prompt is empty"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=b"123"), "4 bytes each"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=pack([99])), "has token id 99"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=pack([1] * 500)), "leaves no room"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=pack([1, 2])), "skip_blocks 0 leaves nothing"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=pack(PROMPT), skip_blocks=7), "leaves nothing of 7"),
        (worker_pb2.PrefillRequest(kv_format="format", prompt_ids=pack(PROMPT), skip_blocks=-1), "skip_blocks -1"),
    ],
)
async def test_a_prefill_that_cannot_run_is_refused(
    two: tuple[Stack, Stack], request_: worker_pb2.PrefillRequest, complaint: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await worker_pb2_grpc.WorkerStub(two[0].channel).Prefill(request_).read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert complaint in (error.value.details() or "")


async def test_a_full_prefill_worker_says_so_and_the_decoder_computes(two: tuple[Stack, Stack]) -> None:
    prefiller, worker = two
    prefiller.hold()
    busy = Gateway(prefiller.channel)
    busy.start("busy", [1, 2, 3, 4], [9] * 20, max_tokens=2)
    await prefiller.scheduler.until(lambda state: state.credits.sequences == 0)
    await run(worker, sources=[at(prefiller, KvSource.KIND_PREFILL)])
    assert worker.metric("headrace_kv_import_failures_total", source="prefill", reason="resource_exhausted") == 1
    prefiller.release()
    await asyncio.gather(prefiller.idle(), worker.idle())


class Holder(worker_pb2_grpc.WorkerServicer):
    """A peer that misbehaves: hands out what `spoil` makes of a good worker's chunks."""

    def __init__(self, good: list[cache_pb2.KvChunk], spoil: Callable[[list[cache_pb2.KvChunk]], AsyncIterator[Any]]):
        self._good = good
        self._spoil = spoil
        self.asked, self.ended = asyncio.Event(), asyncio.Event()

    async def FetchBlocks(self, request: Any, context: Any) -> AsyncIterator[cache_pb2.KvChunk]:
        self.asked.set()
        try:
            async for chunk in self._spoil(self._good):
                yield chunk
        finally:
            self.ended.set()


async def lies(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    """Gives other bytes, with a digest that fits them."""
    yield good[0]
    wrong = bytes(255 - byte for byte in good[1].data)
    yield cache_pb2.KvChunk(
        kv_format="format", block_hash=good[1].block_hash, data=wrong, last=True, digest=digest(wrong)
    )


async def corrupts(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    good[1].data = b"x" + good[1].data[1:]
    yield good[1]


async def stalls(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    await asyncio.Event().wait()


async def trickles(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    while True:
        yield cache_pb2.KvChunk()
        await asyncio.sleep(0.02)


async def gives_up(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]


async def breaks(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    raise RuntimeError("a bug in the holder")


async def mixes_up(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    yield good[2]


async def cuts_short(good: list[cache_pb2.KvChunk]) -> AsyncIterator[cache_pb2.KvChunk]:
    yield good[0]
    short = good[1].data[:-1]
    yield cache_pb2.KvChunk(
        kv_format="format", block_hash=good[1].block_hash, data=short, last=True, digest=digest(short)
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lies, "digest"),
        (corrupts, "digest"),
        (stalls, "slow"),
        (trickles, "slow"),
        (gives_up, "missing"),
        (breaks, "internal"),
        (mixes_up, "order"),
        (cuts_short, "size"),
    ],
)
async def test_a_holder_that_fails_costs_time_and_no_token(spoil: Any, reason: str) -> None:
    peer, worker = Stack(), Stack(kv_fetch_stall_s=0.2)
    await peer.start()
    await worker.start()
    await run(peer)
    holder = Holder(await fetch(peer, NAMES), spoil)
    server = GrpcServer([Registration(worker_pb2_grpc.add_WorkerServicer_to_server, holder, "headrace.v1.Worker")])
    port = await server.start("127.0.0.1:0")
    await peer.cache.until(lambda: peer.cache.digests.keys() >= set(NAMES[:BLOCKS]))
    digests = b"".join(peer.cache.digests[name] for name in NAMES[:BLOCKS])
    source = KvSource(kind=KvSource.KIND_WORKER, address=f"127.0.0.1:{port}", blocks=BLOCKS, digests=digests)
    gateway = await run(worker, sources=[source])
    assert gateway.cached == {1: BLOCK_SIZE}, "what was right is kept"
    assert worker.metric("headrace_kv_import_failures_total", source="worker", reason=reason) == 1
    await holder.ended.wait()
    await worker.idle()
    for stack in (peer, worker):
        await stack.stop()
        await stack.close()
    await server.stop(0)


async def test_after_a_source_that_fails_the_next_one_is_asked(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    nobody = KvSource(kind=KvSource.KIND_WORKER, address="127.0.0.1:1", blocks=BLOCKS)
    gateway = await run(worker, sources=[nobody, at(peer)])
    assert gateway.cached == {1: BLOCKS * BLOCK_SIZE}
    assert worker.metric("headrace_kv_import_failures_total", source="worker", reason="unavailable") == 1


async def test_a_request_cancelled_while_its_kv_comes_leaves_nothing_behind(two: tuple[Stack, Stack]) -> None:
    peer, worker = two
    await run(peer)
    holder = Holder(await fetch(peer, NAMES), stalls)
    server = GrpcServer([Registration(worker_pb2_grpc.add_WorkerServicer_to_server, holder, "headrace.v1.Worker")])
    source = KvSource(
        kind=KvSource.KIND_WORKER, address=f"127.0.0.1:{await server.start('127.0.0.1:0')}", blocks=BLOCKS
    )
    gateway = Gateway(worker.channel)
    gateway.start("r", [1, 2], PROMPT, sources=[source])
    await holder.asked.wait()
    gateway.cancel(1)
    gateway.cancel(2)
    await gateway.finish(1, 2)
    await holder.ended.wait()
    await run(worker, [5, 6], request="other")
    await worker.idle()
    assert worker.service._capacity.free.blocks == NUM_BLOCKS
    await server.stop(0)
