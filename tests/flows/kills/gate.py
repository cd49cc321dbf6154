"""A gate before each step of a worker's engine: it computes no token beyond those that its test allows.

Two numbers in a file that both sides map: how many tokens are allowed, and how many there are. And a token that kills:
a worker dies of the step in which a prompt has it.
"""

import mmap
import os
import signal
import struct
import time
from pathlib import Path

from services.worker.engine.engine import Engine, StepResult

OPEN = 2**62
DEADLY_TOKEN = 98
_PAIR = struct.Struct("<qq")


class Gate:
    """The test's side."""

    def __init__(self, path: Path, allowed: int = OPEN) -> None:
        self.path = path
        path.write_bytes(_PAIR.pack(allowed, 0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _PAIR.size)

    def allow(self, tokens: int) -> None:
        """So many more than there are."""
        struct.pack_into("<q", self._memory, 0, min(OPEN, self.tokens + tokens))

    @property
    def tokens(self) -> int:
        """Computed since the worker's start."""
        return int(struct.unpack_from("<q", self._memory, 8)[0])


def hold_engine(path: Path) -> None:
    """The worker's side."""
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), _PAIR.size)
    step = Engine.step

    def gated(engine: Engine) -> StepResult:
        while True:
            allowed, tokens = _PAIR.unpack_from(memory)
            if tokens < allowed:
                break
            time.sleep(0.001)
        if any(DEADLY_TOKEN in sequence.tokens[: sequence.prompt_length] for sequence in engine._batcher._running):
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(engine)
        struct.pack_into("<q", memory, 8, tokens + len(result.tokens))
        return result

    Engine.step = gated  # type: ignore[method-assign]
