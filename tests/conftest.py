"""Fixtures that tests of several packages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run, with an append-only file."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty Redis."""
    redis_server.flush()
    return redis_server.url


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store in which the kernels of tiny models are kept, so that equal shapes are compiled once in a run."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the default model, converted on the first run of all (30 s) and kept in the user's own store."""
    from services.worker.model_store import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL)
