"""The cache service as a process."""

import os
import re
import signal
import sys
from asyncio import subprocess
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.common.block_digest import digest
from services.common.channel import dial
from services.common.kv_blocks import BlockBytes, chunks
from services.common.kv_wire import ChunkChannel, encode


@asynccontextmanager
async def running(**settings: str) -> AsyncIterator[tuple[subprocess.Process, str]]:
    """The process, and the address that it says it is ready on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    environment |= {"HEADRACE_CACHE_PORT": "0", "HEADRACE_CACHE_METRICS_PORT": "0"}
    environment |= {f"HEADRACE_CACHE_{name.upper()}": value for name, value in settings.items()}
    process = await subprocess.create_subprocess_exec(
        sys.executable, "-m", "services.cache", stderr=PIPE, env=environment
    )
    try:
        assert process.stderr is not None
        ready = None
        while ready is None:
            line = (await process.stderr.readline()).decode()
            assert line, "the cache service ended"
            ready = re.search(r"ready on (127\.0\.0\.1:\d+)", line)
        yield process, ready[1]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_it_serves_and_ends_on_sigterm_with_streams_open() -> None:
    async with running() as (process, address), dial(address) as channel:
        watch = cache_pb2_grpc.CacheStub(channel).Watch(cache_pb2.WatchRequest(scheduler_id="s"))
        first = await watch.read()
        assert isinstance(first, cache_pb2.IndexUpdate) and first.HasField("snapshot_end")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def test_what_it_was_given_to_keep_is_there_after_a_restart(tmp_path: Path) -> None:
    block = BlockBytes(b"n" * 16, b"kv" * 50_000, digest(b"kv" * 50_000))
    async with running(disk_path=str(tmp_path)) as (process, address), dial(address) as channel:
        answer = await cache_pb2_grpc.CacheStub(ChunkChannel(channel)).Store(map(encode, chunks("f32", block)))
        assert answer.stored_blocks == 1
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    settings = {"disk_path": str(tmp_path), "id": "c1", "advertise_address": "cache.example:50071"}
    async with running(**settings) as (_, address), dial(address) as channel:
        stub = cache_pb2_grpc.CacheStub(ChunkChannel(channel))
        (match,) = (await stub.Lookup(cache_pb2.LookupRequest(kv_format="f32", block_hashes=block.name))).matches
        assert (match.holder.id, match.holder.address) == ("c1/f32", "cache.example:50071")
        request = cache_pb2.FetchBlocksRequest(kv_format="f32", block_hashes=block.name)
        assert [chunk async for chunk in stub.FetchBlocks(request)] == list(chunks("f32", block))
