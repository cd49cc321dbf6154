"""The private Redis: a real one is started with our arguments and asked what it understood."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
import redis

from tests.redis_server import free_port, redis_binaries
from toolkit.health import redis_answers
from toolkit.process import ProcessSpec
from toolkit.redis_server import find_redis_server, redis_command
from toolkit.supervisor import Supervisor


def test_one_is_found() -> None:
    assert find_redis_server() in redis_binaries()


def test_one_on_path_that_is_too_old_or_broken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = tmp_path / "redis-server"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script in ("echo Redis server v=6.0.16 sha=0", "echo something else", "exit 1"):
        on_path.write_text(f"#!/bin/sh\n{script}\n")
        on_path.chmod(0o755)
        assert find_redis_server() != str(on_path)
    on_path.write_text("#!/bin/sh\necho Redis server v=7.2.4 sha=0\n")
    assert find_redis_server() == str(on_path)


async def test_it_keeps_what_it_is_told(tmp_path: Path) -> None:
    port = free_port()
    command = redis_command(find_redis_server(), port, tmp_path)
    probe = partial(redis_answers, "127.0.0.1", port)
    assert not await probe()
    supervisor = Supervisor(lambda: None)
    supervisor.start([ProcessSpec("redis", "", command, {}, tmp_path / "redis.log", probe, stop_grace_s=20)])
    try:
        async with asyncio.timeout(20):
            await supervisor.wait_ready()
        with redis.Redis(port=port, decode_responses=True) as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    finally:
        await supervisor.stop()
