"""Products as fast as threads can, of numbers that stay in registers: what tiles are compared with."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.integer_tiles import byte_products
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.matrix_tiles import (
    PANEL_COLUMNS,
    STEP_BYTES,
    TILE_ROWS,
    begin_tiles,
    end_tiles,
    tile_products,
)
from services.worker.engine.kernels.compiled.tiles import RUN_BYTES
from services.worker.engine.kernels.compiled.vectors import (
    F32,
    I32,
    I64,
    Builder,
    Value,
    add_pair_products,
    call,
    constant,
    multiply_add,
    vector,
)

TURNS = 1 << 20  # of a thread's loop; at most 4 products a turn and lane, which float32 still counts exactly
MATRIX_TURNS = 1 << 17  # likewise, with 32 products a turn and sum, or 64 of bytes
_PANEL_STEPS = 8
_ONE = 0x3F80  # as bfloat16


def make_products(isa: Isa, weight_bits: int) -> Callable[[ThreadPoolExecutor, int], int]:
    """`multiply(pool, count)`: `count` threads multiply and add as tiles do, with as many sums as fit into registers.

    `weight_bits` says what is multiplied: what tiles multiply with weights of so many; with 4 bits, bytes. All numbers
    are ones, so that the sums tell how many products there were: that is what it returns.
    """
    matrices = isa.uses_matrices(weight_bits)
    run = _matrix_products(weight_bits) if matrices else _vector_products(isa, isa.activation_bits(weight_bits))
    turns = MATRIX_TURNS if matrices else TURNS

    def multiply_all(pool: ThreadPoolExecutor, count: int) -> int:
        return sum(pool.map(run, [turns] * count))

    return multiply_all


def _vector_products(isa: Isa, activation_bits: int) -> Callable[[int], int]:
    one, sum_type, multiply = _kind(isa, activation_bits)

    @intrinsic
    def loop(_: Any, turns: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            zero = constant(sum_type, isa.lanes, 0)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(isa.accumulators)]
            with cgutils.for_range(builder, arguments[0], intp=I64):
                x, weight = (_opaque(builder, value) for value in one)
                for sum_ in sums:
                    builder.store(multiply(builder, builder.load(sum_), x, weight), sum_)
            return _count(builder, [builder.load(sum_) for sum_ in sums])

        return types.int64(types.int64), generate

    @njit(types.int64(types.int64), nogil=True)
    def run(turns: int) -> int:
        return loop(turns)

    return run


def _matrix_products(bits: int) -> Callable[[int], int]:
    """Of a panel with two tiles of rows, which stay in the nearest cache. A turn is a step."""
    multiply = tile_products(2, bits=bits, adding=True)

    @njit(types.void(types.int64, types.int64, types.int64, types.int64), nogil=True)
    def repeat(turns: int, x: int, panel: int, out: int) -> None:
        out_bytes = 4 * PANEL_COLUMNS
        begin_tiles(TILE_ROWS)
        for _ in range(turns // _PANEL_STEPS):
            multiply(
                x, RUN_BYTES, 0, TILE_ROWS * RUN_BYTES, panel, _PANEL_STEPS, out, out_bytes, TILE_ROWS * out_bytes, 0
            )
        end_tiles()

    def run(turns: int) -> int:
        one, sum_type = (np.uint16(_ONE), np.float32) if bits == 16 else (np.uint8(1), np.int32)
        x = np.full(2 * TILE_ROWS * RUN_BYTES * 8 // bits, one)
        panel = np.full(_PANEL_STEPS * STEP_BYTES * 8 // bits, one)
        out = np.zeros((2 * TILE_ROWS, PANEL_COLUMNS), sum_type)
        repeat(turns, x.ctypes.data, panel.ctypes.data, out.ctypes.data)
        return int(out.sum(dtype=np.float64))

    return run


def _kind(isa: Isa, bits: int) -> tuple[tuple[Value, Value], Any, Callable[..., Value]]:
    """The two vectors of ones, the type of their sums, and the operation (builder, sum, one, other)."""
    if bits == 8:
        # With byte pairs, an unsigned u stands for u - 128.
        unsigned = 0x81818181 if isa.byte_pairs else 0x01010101
        return (constant(I32, isa.lanes, unsigned), constant(I32, isa.lanes, 0x01010101)), I32, byte_products(isa)
    if bits == 16:
        ones = constant(I32, isa.lanes, 0x3F803F80)
        return (ones, ones), F32, add_pair_products
    ones = constant(F32, isa.lanes, 1.0)
    return (ones, ones), F32, lambda builder, total, x, weight: multiply_add(builder, x, weight, total)


def _opaque(builder: Builder, value: Value) -> Value:
    """The same value, of which the compiler knows nothing: so it cannot take what is done with it out of a loop."""
    kind = ir.FunctionType(value.type, [value.type])
    return builder.asm(kind, "", "=v,0", [value], side_effect=True)


def _count(builder: Builder, sums: list[Value]) -> Value:
    """All lanes of all sums, as an int64."""
    wide = vector(I64, sums[0].type.count)
    if sums[0].type.element == F32:
        parts = [builder.fptosi(sum_, wide) for sum_ in sums]
    else:
        parts = [builder.sext(sum_, wide) for sum_ in sums]
    total = parts[0]
    for part in parts[1:]:
        total = builder.add(total, part)
    return call(builder, f"llvm.vector.reduce.add.v{wide.count}i64", I64, [total])
