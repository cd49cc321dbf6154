"""Log levels that change while a service runs, each by a signal of its own.

A signal works alike for every service, takes no port, and only the process's owner can send it. Linux keeps the
real-time signals from `SIGRTMIN` on for such uses; the default action of each is to end the process.
"""

import asyncio
import logging
import signal
from pathlib import Path
from typing import Literal, get_args

Level = Literal["debug", "info", "warning", "error"]

LEVELS: tuple[Level, ...] = get_args(Level)

log = logging.getLogger(__name__)


def signal_of(level: Level) -> int:
    """SIGRTMIN+1 for debug, to SIGRTMIN+4 for error."""
    return signal.SIGRTMIN + 1 + LEVELS.index(level)


def follow_signals(loop: asyncio.AbstractEventLoop) -> None:
    """From now on these signals change what this process logs."""
    for level in LEVELS:
        loop.add_signal_handler(signal_of(level), _change, level)


def follows_signals(pid: int) -> bool:
    """Whether that process changes its level by them: one that is still starting would end."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return all(caught >> (signal_of(level) - 1) & 1 for level in LEVELS)


def _change(level: Level) -> None:
    root = logging.getLogger()
    number, before = getattr(logging, level.upper()), logging.getLevelName(root.level).lower()
    root.setLevel(number)
    log.log(number, "log level %s, and %s before", level, before)
