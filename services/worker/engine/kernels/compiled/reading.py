"""Memory read as fast as threads can, for nothing: what tiles that stream weights are compared with."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.vectors import (
    I32,
    I64,
    Builder,
    Value,
    at,
    call,
    constant,
    fetch_lines,
    load,
    pointer,
)

_LANES = 16
_RUN_BYTES = 1024  # that one turn of the loop reads
_AHEAD_BYTES = 8192  # how far before its use memory is asked for; from 2048 to 16384 all do the same
_SUMS = 8


@intrinsic
def _read(_: Any, first: Any, runs: Any) -> Any:
    """Reads `runs` times _RUN_BYTES at an address; their exclusive or, so that nothing can be left out."""

    def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        first, runs = arguments
        sums = [cgutils.alloca_once_value(builder, constant(I32, _LANES, 0)) for _ in range(_SUMS)]
        with cgutils.for_range(builder, runs, intp=I64) as loop:
            run = at(builder, pointer(builder, first), builder.mul(loop.index, I64(_RUN_BYTES)))
            fetch_lines(builder, at(builder, run, I64(_AHEAD_BYTES)), _RUN_BYTES)
            for index in range(_RUN_BYTES // (4 * _LANES)):
                words = load(builder, at(builder, run, I64(4 * _LANES * index)), I32, _LANES)
                sum_ = sums[index % _SUMS]
                builder.store(builder.xor(builder.load(sum_), words), sum_)
        total = builder.load(sums[0])
        for sum_ in sums[1:]:
            total = builder.xor(total, builder.load(sum_))
        return call(builder, f"llvm.vector.reduce.xor.v{_LANES}i32", I32, [total])

    return types.int32(types.int64, types.int64), generate


@njit(types.int32(types.int64, types.int64), nogil=True)
def _read_runs(first: int, runs: int) -> int:
    return _read(first, runs)


def read_memory(memory: npt.NDArray[np.uint8], threads: ThreadPoolExecutor, count: int) -> list[int]:
    """Has `count` threads of the pool read a run of `memory` each, of which whole KiB are read.

    Returns the exclusive or of each one's int32s.
    """
    runs = len(memory) // _RUN_BYTES // count
    starts = [memory.ctypes.data + index * runs * _RUN_BYTES for index in range(count)]
    return list(threads.map(_read_runs, starts, [runs] * count))
