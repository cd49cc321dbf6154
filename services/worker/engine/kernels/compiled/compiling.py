"""Compiles a step's kernels in a process of its own, which takes with it the hundreds of MiB that a compiler leaves.

Usage: python -m services.worker.engine.kernels.compiled.compiling ISA SHAPE, which is a `Shape` as JSON; writes the
archive to stdout.
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from services.worker.engine.kernels.compiled.isa import Isa, IsaName, choose_isa

if TYPE_CHECKING:  # each of them defines what is to be compiled
    from services.worker.engine.kernels.compiled.frame import Shape


def compile_apart(isa: Isa, shape: "Shape") -> bytes:
    """The archive of `make_kernels`. RuntimeError if it cannot be compiled, with what the process had to say."""
    program = [sys.executable, "-P", "-m", __name__, isa.name, json.dumps(asdict(shape))]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"the kernels cannot be compiled: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def main(isa_name: IsaName, shape: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who interrupts the worker needs no traceback of this
    isa = choose_isa(isa_name)
    from services.worker.engine.kernels.compiled.frame import Shape
    from services.worker.engine.kernels.compiled.library import archive_of, compile_kernels
    from services.worker.engine.kernels.compiled.step import make_kernels

    sys.stdout.buffer.write(archive_of(compile_kernels(make_kernels(isa, Shape(**json.loads(shape))))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])  # type: ignore[arg-type]
