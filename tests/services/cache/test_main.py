"""The cache service as a process."""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE

from headrace.v1 import cache_pb2, cache_pb2_grpc
from services.common.channel import dial


async def test_it_serves_and_ends_on_sigterm_with_streams_open() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    environment |= {"HEADRACE_CACHE_PORT": "0", "HEADRACE_CACHE_METRICS_PORT": "0"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.cache", stderr=PIPE, env=environment)
    try:
        assert process.stderr is not None
        ready = None
        while ready is None:
            line = (await process.stderr.readline()).decode()
            assert line, "the cache service ended"
            ready = re.search(r"ready on (127\.0\.0\.1:\d+)", line)
        async with dial(ready[1]) as channel:
            watch = cache_pb2_grpc.CacheStub(channel).Watch(cache_pb2.WatchRequest(scheduler_id="s"))
            first = await watch.read()
            assert isinstance(first, cache_pb2.IndexUpdate) and first.HasField("snapshot_end")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
