"""The process: `python -m services.scheduler`."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.config import child_environment
from tests.redis_server import RedisServer, free_port


def start(redis_url: str, port: int, metrics_port: int = 0, host: str = "127.0.0.1") -> "subprocess.Popen[str]":
    caches = f"127.0.0.1:{free_port()}"
    settings = {"redis_url": redis_url, "host": host, "port": port, "metrics_port": metrics_port, "caches": caches}
    environment = child_environment("scheduler", settings)
    command = [sys.executable, "-m", "services.scheduler"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_it_serves_and_ends_with_0_on_sigterm(redis_url: str, host: str, shown: str) -> None:
    port = free_port()
    process = start(redis_url, port, host=host)
    with grpc.insecure_channel(f"{shown}:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="headrace.v1.Scheduler"), wait_for_ready=True)
        assert any(response.status == health_pb2.HealthCheckResponse.SERVING for response in watch)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert f"ready on {shown}:{port}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--appendonly", "no"), "appendonly"), (("--maxmemory-policy", "allkeys-lru"), "allkeys-lru")],
)
def test_it_refuses_a_redis_that_would_lose_requests(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    redis = RedisServer(tmp_path, *options)
    process = start(redis.url, free_port())
    _, log = process.communicate(timeout=20)
    redis.kill()
    assert process.returncode == 1
    assert reason in log
    assert "Traceback" not in log


def test_a_taken_metrics_port_is_said_in_one_sentence(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(redis_url, free_port(), metrics_port=taken.getsockname()[1])
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "scheduler failed: [Errno 98] Address already in use" in log
    assert "Traceback" not in log
