"""Levels follow signals. That every service follows them is for the flow tests."""

import asyncio
import logging
import os
import subprocess
from collections.abc import Iterator

import pytest

from services.common.log_levels import LEVELS, follow_signals, follows_signals, signal_of


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level = root.level
    yield root
    root.setLevel(level)


class Changes(logging.Handler):
    """Tells of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.told = asyncio.Event()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.told.set()


async def test_each_signal_sets_its_level_and_says_so_at_that_level(root: logging.Logger) -> None:
    loop, changes = asyncio.get_running_loop(), Changes()
    root.setLevel(logging.INFO)
    root.addHandler(changes)
    assert not follows_signals(os.getpid())
    follow_signals(loop)
    try:
        assert follows_signals(os.getpid())
        for level in LEVELS:
            changes.told.clear()
            os.kill(os.getpid(), signal_of(level))
            await changes.told.wait()
            assert root.level == getattr(logging, level.upper())
    finally:
        root.removeHandler(changes)
        for level in LEVELS:
            loop.remove_signal_handler(signal_of(level))
    told = [message for message in changes.messages if message.startswith("log level")]
    assert told == [
        "log level debug, and info before",
        "log level info, and debug before",
        "log level warning, and info before",
        "log level error, and warning before",
    ]


def test_a_process_that_does_not_follow_them() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert not follows_signals(other.pid)
        other.kill()
    assert not follows_signals(other.pid)
