"""Starts fake OpenAI-compatible servers for a test, and tells what they saw."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

FAKE_SERVER = (sys.executable, str(Path(__file__).with_name("fake_openai_server.py")))


class FakeServer:
    """A running fake server, which has one child process."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen([*FAKE_SERVER, *options], stdout=subprocess.PIPE, text=True)
        listening = self.next_event()
        self.pid = self.process.pid
        self.child = psutil.Process(listening["child"])
        self.url = f"http://127.0.0.1:{listening['port']}"

    @property
    def pids(self) -> tuple[int, int]:
        return self.pid, self.child.pid

    @property
    def is_stopped(self) -> bool:
        return psutil.STATUS_STOPPED in (psutil.Process(pid).status() for pid in self.pids)

    def next_event(self) -> dict[str, Any]:
        """Waits for what it prints next."""
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> list[dict[str, Any]]:
        """Kills it; gives what it printed since the last `next_event`."""
        self.process.kill()
        self.child.kill()
        printed, _ = self.process.communicate(timeout=20)
        return [json.loads(line) for line in printed.splitlines()]


@contextmanager
def fake_server(*options: str) -> Iterator[FakeServer]:
    server = FakeServer(*options)
    try:
        yield server
    finally:
        if server.process.returncode is None:
            server.end()
