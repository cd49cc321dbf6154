"""The gateway as a process: how it starts, refuses to start, and ends."""

import asyncio
import signal
import sys
from pathlib import Path

from services.common.config import child_environment
from tests.redis_server import RedisServer, free_port


async def start(redis_url: str, **settings: object) -> asyncio.subprocess.Process:
    fields = {"http_port": 0, "grpc_port": 0, "redis_url": redis_url, "schedulers": f"127.0.0.1:{free_port()}"}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.gateway",
        env=child_environment("gateway", fields | settings),
        stderr=asyncio.subprocess.PIPE,
    )


async def until_logged(process: asyncio.subprocess.Process, text: str) -> str:
    assert process.stderr is not None
    seen = ""
    async with asyncio.timeout(30):
        async for line in process.stderr:
            seen += line.decode()
            if text in seen:
                return seen
    raise AssertionError(f"{text!r} was never logged: {seen}")


async def test_it_says_when_it_listens_and_ends_cleanly_on_sigterm(redis_url: str) -> None:
    process = await start(redis_url)
    await until_logged(process, "ready on 127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 15) == 0


async def test_it_refuses_a_redis_that_forgets(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path, "--appendonly", "no")
    try:
        process = await start(redis.url)
        assert "appendonly" in await until_logged(process, "cannot start")
        assert await asyncio.wait_for(process.wait(), 15) == 1
        process = await start(redis.url, allow_volatile_redis=True)
        await until_logged(process, "ready on")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 15) == 0
    finally:
        redis.kill()


async def test_it_names_a_setting_that_is_not_there(redis_url: str) -> None:
    process = await start(redis_url, no_such_setting=1)
    await until_logged(process, "HEADRACE_GATEWAY_NO_SUCH_SETTING")
    assert await process.wait() == 2


async def test_no_torch_in_the_process() -> None:
    code = "import sys, services.gateway.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
