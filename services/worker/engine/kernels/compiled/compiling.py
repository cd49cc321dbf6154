"""Compiles a step's kernels in a process of its own, which takes with it the hundreds of MiB that a compiler leaves."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from services.worker.engine.kernels.compiled.isa import Isa, IsaName, choose_isa

# By the path of the process that asks, so that it is the same sources that are compiled.
_PROGRAM = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {__name__} import main
main(*sys.argv[2:])
"""

if TYPE_CHECKING:  # each of them defines what is to be compiled
    from services.worker.engine.kernels.compiled.frame import Shape


def compile_apart(isa: Isa, shape: "Shape") -> bytes:
    """The archive of `make_kernels`. RuntimeError if it cannot be compiled, with what the process had to say."""
    path = [os.path.abspath(folder) for folder in sys.path]
    command = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(path), isa.name, json.dumps(asdict(shape))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or "it said nothing"
        raise RuntimeError(f"the kernels cannot be compiled (exit status {done.returncode}): {reason}")
    return done.stdout


def main(isa_name: IsaName, shape: str) -> None:
    """What the process does: writes the archive to stdout. `shape`: a `Shape` as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who interrupts the worker needs no traceback of this
    isa = choose_isa(isa_name)
    from services.worker.engine.kernels.compiled.frame import Shape
    from services.worker.engine.kernels.compiled.library import archive_of, compile_kernels
    from services.worker.engine.kernels.compiled.step import make_kernels

    sys.stdout.buffer.write(archive_of(compile_kernels(make_kernels(isa, Shape(**json.loads(shape))))))
