"""Keeping blocks over real gRPC: what is fetched is what was stored, and the index says what is kept."""

from collections.abc import Awaitable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.cache import block_file
from services.cache.block_key import BlockKey
from services.common.block_digest import digest
from services.common.channel import dial
from services.common.kv_blocks import CHUNK_BYTES, BlockAssembler, BlockBytes, chunks
from services.common.kv_wire import decode, encode
from tests.services.cache.serving import BLOCKS, MIB, Copy, Publisher, Service, serving


def block(number: int, size: int = 1000) -> BlockBytes:
    data = bytes([number]) * size
    return BlockBytes(BLOCKS[number], data, digest(data))


def messages(*blocks: BlockBytes, kv_format: str = "f32") -> list[cache_pb2.KvChunk]:
    return [cache_pb2.KvChunk.FromString(encode(chunk)) for one in blocks for chunk in chunks(kv_format, one)]


async def store(service: Service, *blocks: BlockBytes, kv_format: str = "f32") -> cache_pb2.StoreResponse:
    return await service.stub.Store(iter(messages(*blocks, kv_format=kv_format)))


async def fetch(service: Service, *names: bytes, kv_format: str = "f32") -> list[BlockBytes]:
    assembler = BlockAssembler(4 * MIB, kv_format)
    request = cache_pb2.FetchBlocksRequest(kv_format=kv_format, block_hashes=b"".join(names))
    received = [decode(message.SerializeToString()) async for message in service.stub.FetchBlocks(request)]
    return [whole for chunk in received if (whole := assembler.take(chunk)) is not None]


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


async def test_stored_blocks_are_fetched_up_to_the_first_that_is_missing(service: Service) -> None:
    blocks = [block(0), block(1, 3 * CHUNK_BYTES + 1), block(2), block(4)]
    answer = await store(service, *blocks)
    assert (answer.stored_blocks, answer.stored_bytes) == (4, sum(len(one.data) for one in blocks))
    assert await fetch(service, *BLOCKS[:6]) == blocks[:3]
    assert await fetch(service, BLOCKS[2], BLOCKS[0]) == [blocks[2], blocks[0]], "in the order asked for"
    assert await fetch(service, BLOCKS[3]) == await fetch(service) == []
    assert await fetch(service, BLOCKS[0], kv_format="bf16") == []
    assert service.metrics.get_sample_value("headrace_cache_hits_total", {"tier": "ram"}) == 5
    assert service.metrics.get_sample_value("headrace_cache_misses_total") == 3
    assert service.metrics.get_sample_value("headrace_cache_received_bytes_total") == answer.stored_bytes
    assert service.metrics.get_sample_value("headrace_cache_stored_blocks", {"tier": "ram"}) == 4


async def test_what_is_held_already_counts_as_stored_and_stays(service: Service) -> None:
    await store(service, block(0))
    other = BlockBytes(BLOCKS[0], b"other", digest(b"other"))
    answer = await store(service, other, block(1))
    assert (answer.stored_blocks, answer.stored_bytes) == (2, 1005)
    assert await fetch(service, *BLOCKS[:2]) == [block(0), block(1)]


async def test_the_service_is_a_holder_in_its_own_index(service: Service) -> None:
    copy, publisher = Copy(service), Publisher(service)
    publisher.events(1, BLOCKS[0], snapshot=True)
    await store(service, block(0), block(1))
    await store(service, block(2), kv_format="bf16")
    held = {"w1": {BLOCKS[0]}, "c1/f32": {BLOCKS[0], BLOCKS[1]}, "c1/bf16": {BLOCKS[2]}}
    await copy.until(held)
    assert copy.digests == {BLOCKS[number]: block(number).digest for number in range(3)}
    late = Copy(service)
    await late.until(held)
    request = cache_pb2.LookupRequest(kv_format="f32", block_hashes=b"".join(BLOCKS[:3]))
    longest, _ = (await service.stub.Lookup(request)).matches
    assert (longest.holder.id, longest.blocks) == ("c1/f32", 2)
    async with dial(longest.holder.address) as channel:
        elsewhere = Service(cache_pb2_grpc.CacheStub(channel), service.index, service.metrics)
        assert await fetch(elsewhere, *BLOCKS[:2]) == [block(0), block(1)]


async def test_evicted_blocks_leave_the_index_and_the_last_takes_its_holder_along() -> None:
    async with serving(ram_bytes=5000) as service:
        copy = Copy(service)
        await store(service, block(0), block(1))
        await copy.until({"c1/f32": set(BLOCKS[:2])})
        await store(service, block(2, 3900), kv_format="bf16")
        await copy.until({"c1/bf16": {BLOCKS[2]}})
        assert await fetch(service, BLOCKS[0]) == []
        assert service.metrics.get_sample_value("headrace_cache_evictions_total", {"tier": "ram"}) == 2


async def test_what_there_is_no_room_for_is_not_counted_as_stored() -> None:
    async with serving(ram_bytes=5000) as service:
        answer = await store(service, block(0), block(1, 6000), block(2))
        assert (answer.stored_blocks, answer.stored_bytes) == (2, 2000)


@pytest.mark.parametrize("fault", ["digest", "order", "size"])
async def test_a_bad_block_ends_the_stream_and_those_before_it_stay(service: Service, fault: str) -> None:
    sent = messages(block(0), block(1, 2 * CHUNK_BYTES), block(2))
    if fault == "digest":
        sent[2].data = sent[2].data[1:] + b"x"
    elif fault == "order":
        del sent[1]
    else:
        sent[1:1] = messages(block(3, 4 * MIB + 1))
    code, _ = await refusal(service.stub.Store(iter(sent)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert await fetch(service, *BLOCKS[:3]) == [block(0)]
    assert service.metrics.get_sample_value("headrace_cache_refused_total", {"reason": fault}) == 1


async def test_a_block_cut_off_by_the_end_of_the_stream_is_not_kept(service: Service) -> None:
    answer = await service.stub.Store(iter(messages(block(0), block(1, 2 * CHUNK_BYTES))[:-1]))
    assert answer.stored_blocks == 1
    assert await fetch(service, *BLOCKS[:2]) == [block(0)]


@pytest.mark.parametrize(
    ("kv_format", "name", "complaint"),
    [("", BLOCKS[0], "kv_format is empty"), ("f" * 1025, BLOCKS[0], "kv_format is longer"), ("f32", b"x" * 15, "15")],
)
async def test_bad_names_are_refused(service: Service, kv_format: str, name: bytes, complaint: str) -> None:
    bad = cache_pb2.KvChunk(kv_format=kv_format, block_hash=name, data=b"x", last=True, digest=digest(b"x"))
    request = cache_pb2.FetchBlocksRequest(kv_format=kv_format, block_hashes=name)
    for call in (service.stub.Store(iter([bad])), service.stub.FetchBlocks(request).read()):
        code, details = await refusal(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert complaint in details


async def test_blocks_on_disk_outlive_the_service_and_are_in_the_index_from_the_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        await store(service, block(0), block(1, 2 * CHUNK_BYTES), block(2))
    async with serving(tmp_path) as service:
        copy = Copy(service)
        await copy.until({"c1/f32": set(BLOCKS[:3])})
        assert copy.snapshot_blocks == 3
        assert copy.digests[BLOCKS[1]] == block(1, 2 * CHUNK_BYTES).digest
        assert await fetch(service, *BLOCKS[:3]) == [block(0), block(1, 2 * CHUNK_BYTES), block(2)]
        assert await fetch(service, *BLOCKS[:3]) == [block(0), block(1, 2 * CHUNK_BYTES), block(2)]
        for tier in ("disk", "ram"):
            assert service.metrics.get_sample_value("headrace_cache_hits_total", {"tier": tier}) == 3


async def test_a_corrupt_block_ends_the_run_and_leaves_the_index(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        await store(service, block(0), block(1), block(2))
    path = block_file.path_of(tmp_path, BlockKey("f32", BLOCKS[1]))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    async with serving(tmp_path) as service:
        copy = Copy(service)
        assert await fetch(service, *BLOCKS[:3]) == [block(0)]
        await copy.until({"c1/f32": {BLOCKS[0], BLOCKS[2]}})
        assert service.metrics.get_sample_value("headrace_cache_dropped_total", {"reason": "digest"}) == 1
        await store(service, block(1))
        assert await fetch(service, *BLOCKS[:3]) == [block(0), block(1), block(2)]


async def test_a_fetch_that_is_cancelled_leaves_the_service_as_it_was(service: Service) -> None:
    blocks = [block(number, 3 * MIB) for number in range(8)]
    await store(service, *blocks)
    request = cache_pb2.FetchBlocksRequest(kv_format="f32", block_hashes=b"".join(BLOCKS))
    call = service.stub.FetchBlocks(request)
    assert isinstance(await call.read(), cache_pb2.KvChunk)
    call.cancel()
    assert await fetch(service, *BLOCKS) == blocks
