"""Forks workers that need not import anything any more: `python -m tests.flows.kills.nursery_process`.

Reads one JSON order per line, answers with the pid of the new worker. The workers die with this process, and this one
with its parent. Each runs behind a gate (`gate.py`) that its test opens token by token.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

# What a worker would import later.
import llvmlite.binding
import numba
import tokenizers
import torch
import transformers

import services.worker.__main__ as worker
import services.worker.engine.kernels.compiled.step
import services.worker.engine.model.compiled_llama
from tests.flows.kills.gate import hold_engine

_PRELOADED = (llvmlite.binding, numba, tokenizers, torch, transformers, services)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_worker(order)
        print(pid, flush=True)


def _be_worker(order: dict[str, object]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])  # type: ignore[call-overload]
    hold_engine(Path(str(order["gate"])))
    try:
        worker.main()
    finally:
        os._exit(1)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
