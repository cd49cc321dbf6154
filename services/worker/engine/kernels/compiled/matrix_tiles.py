"""AMX: registers that hold 16 rows of 64 bytes, and products of two of them. The fastest that some processors multiply.

One instruction adds 16 rows of 32 bfloat16 times 32 rows of 16 columns to 16 rows of 16 float32, or 16 rows of 64 bytes
times 64 rows of 16 columns to as many int32. An output is summed in the same order however many of the rows are used,
and of however many registers, so that a row's result does not depend on the others. Panels of packed weights (see
`packing`) are read as they are, a step of 32 or 64 k at a time.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.integer_tiles import less_offset, scaled
from services.worker.engine.kernels.compiled.tiles import RUN_BYTES
from services.worker.engine.kernels.compiled.vectors import (
    BF16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LOG2_E,
    Builder,
    Value,
    absolute,
    at,
    call,
    constant,
    fetch_lines,
    interleave,
    load,
    pointer,
    reciprocal,
    short_power_of_two,
    vector,
)

TILE_ROWS = 16
TILE_DEPTH = 32  # bfloat16 in a row of a register
PANEL_COLUMNS = 32  # of two registers side by side
_LINE_BYTES = 64
_PANEL_ROW_BYTES = 4 * PANEL_COLUMNS
STEP_BYTES = RUN_BYTES * PANEL_COLUMNS  # of a panel
_REGISTERS = 8
# Registers: 0 to 3 for sums, of two rows of tiles and two columns; then a register for each row's activations and one
# for each column's weights.
_ACTIVATIONS, _WEIGHTS = 4, 6


@intrinsic
def begin_tiles(_: Any, rows: Any) -> Any:
    """Prepares this thread's registers: sums and activations of `rows` rows, at most TILE_ROWS, weights of all."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        # The format is Intel's: palette 1, from byte 16 on the bytes of a register's rows, from 48 on how many it has.
        settings = cgutils.alloca_once(builder, ir.ArrayType(I8, 64))
        builder.store(ir.Constant(ir.ArrayType(I8, 64), [1] + [0] * 63), settings)
        rows, base = builder.trunc(arguments[0], I8), pointer(builder, builder.ptrtoint(settings, I64))
        for register in range(_REGISTERS):
            builder.store(I16(RUN_BYTES), at(builder, base, I64(16 + 2 * register)), align=1)
            of_register = I8(TILE_ROWS) if register >= _WEIGHTS else rows
            builder.store(of_register, at(builder, base, I64(48 + register)), align=1)
        _tile(builder, "ldtilecfg", base)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def end_tiles(_: Any) -> Any:
    """Gives the registers back, so that the system need not save them when it switches threads."""

    def generate(context: Any, builder: Builder, __: Any, ___: Any) -> Value:
        _tile(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def tile_products(
    tiles: int, *, bits: int = 16, adding: bool = False, passing: bool = False, fetched_lines: int = 0
) -> Any:
    """Intrinsic (activations, row_bytes, step_bytes, apart, panel, steps, out, out_row_bytes, out_apart, ahead):
    out = activations x panel of `steps` times RUN_BYTES of k, for `tiles` tiles of rows, 1 or 2.

    A step's activations, RUN_BYTES of a row, are `row_bytes` from row to row, `step_bytes` from step to step and
    `apart` bytes from the first tile to the second; so is `out`, [rows][PANEL_COLUMNS]. With 16 bits all factors are
    bfloat16, and out is float32; with 8 activations are signed and weights unsigned bytes, and out is int32. `adding`:
    to what out holds. `passing`: activations stay out of the first-level cache, so that the panel can stay there. Each
    step has `fetched_lines` more lines of memory from `ahead` on fetched into the cache; no memory need be there.
    """
    load_activations = "tileloaddt164" if passing else "tileloadd64"
    product = {16: "tdpbf16ps", 8: "tdpbsud"}[bits]

    @intrinsic
    def multiply(
        _: Any, activations: Any, row_bytes: Any, step_bytes: Any, apart: Any, panel: Any, steps: Any, out: Any,
        out_row_bytes: Any, out_apart: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            activations, row_bytes, step_bytes, apart, panel, steps, out, out_row_bytes, out_apart, ahead = arguments
            x, weights, sums = (pointer(builder, address) for address in (activations, panel, out))
            places = [
                (2 * tile + column, at(builder, sums, builder.add(builder.mul(out_apart, I64(tile)), I64(64 * column))))
                for tile in range(tiles)
                for column in range(2)
            ]
            for register, where in places:
                if adding:
                    _tile(builder, "tileloadd64", I8(register), where, out_row_bytes)
                else:
                    _tile(builder, "tilezero", I8(register))
            with cgutils.for_range(builder, steps, intp=I64) as loop:
                first = at(builder, weights, builder.mul(loop.index, I64(STEP_BYTES)))
                rows = [
                    at(builder, x, builder.add(builder.mul(loop.index, step_bytes), builder.mul(apart, I64(tile))))
                    for tile in range(tiles)
                ]
                if fetched_lines:
                    offset = builder.mul(loop.index, I64(fetched_lines * _LINE_BYTES))
                    fetch_lines(builder, at(builder, pointer(builder, ahead), offset), fetched_lines * _LINE_BYTES)
                for column in range(2):
                    where = at(builder, first, I64(RUN_BYTES * column))
                    _tile(builder, "tileloadd64", I8(_WEIGHTS + column), where, I64(_PANEL_ROW_BYTES))
                    for tile in range(tiles):
                        if column == 0:
                            _tile(builder, load_activations, I8(_ACTIVATIONS + tile), rows[tile], row_bytes)
                        registers = 2 * tile + column, _ACTIVATIONS + tile, _WEIGHTS + column
                        _tile(builder, product, *map(I8, registers))
            for register, where in places:
                _tile(builder, "tilestored64", I8(register), where, out_row_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return multiply


@intrinsic
def scale_sums(
    _: Any, sums: Any, rows: Any, row_scales: Any, row_sums: Any, column_scales: Any, out: Any, out_row_bytes: Any
) -> Any:
    """out = what sums of bytes stand for: [rows][PANEL_COLUMNS] int32 as float32, in rows of `out_row_bytes`.

    As `byte_panels` has it, `row_scales` and `row_sums` are those of the rows' activations.
    """

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        _, rows, *_, out_row_bytes = arguments
        sums, _, row_scales, row_sums, column_scales, out, _ = (pointer(builder, address) for address in arguments)
        steps = load(builder, column_scales, F32, PANEL_COLUMNS)
        with cgutils.for_range(builder, rows, intp=I64) as loop:
            source = at(builder, sums, builder.mul(loop.index, I64(_PANEL_ROW_BYTES)))
            of_row = builder.mul(loop.index, I64(4))
            products = load(builder, source, I32, PANEL_COLUMNS)
            products = less_offset(builder, products, at(builder, row_sums, of_row))
            values = scaled(builder, products, at(builder, row_scales, of_row), steps)
            builder.store(values, at(builder, out, builder.mul(loop.index, out_row_bytes)), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic
def swiglu_pairs(_: Any, gate: Any, up: Any, count: Any, out: Any) -> Any:
    """out = silu(gate) * up, of `count` float32, a multiple of 16, rounded to bfloat16. Shazeer 2020."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        gate, up, count, out = arguments
        with cgutils.for_range(builder, builder.udiv(count, I64(TILE_ROWS)), intp=I64) as loop:
            offset = builder.mul(loop.index, I64(4 * TILE_ROWS))
            g, u = (load(builder, at(builder, pointer(builder, x), offset), F32, TILE_ROWS) for x in (gate, up))
            # silu(g) is g / (1 + e ** -g), which is g * e ** g / (1 + e ** g): whichever power is at most 1.
            size = builder.fmul(absolute(builder, g), constant(F32, TILE_ROWS, -LOG2_E))
            power = short_power_of_two(builder, size)
            one, zero = (constant(F32, TILE_ROWS, value) for value in (1.0, 0.0))
            share = builder.select(builder.fcmp_ordered("<", g, zero), power, one)
            sigmoid = builder.fmul(share, reciprocal(builder, builder.fadd(one, power)))
            gated = builder.fmul(builder.fmul(g, sigmoid), u)
            to = at(builder, pointer(builder, out), builder.mul(loop.index, I64(2 * TILE_ROWS)))
            builder.store(builder.fptrunc(gated, vector(BF16, TILE_ROWS)), to, align=2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def pair_rows(_: Any, first: Any, second: Any, out: Any) -> Any:
    """16 words of two bfloat16, one of each of two rows."""

    def generate(context: Any, builder: Builder, __: Any, arguments: Any) -> Value:
        *rows, out = (pointer(builder, address) for address in arguments)
        words = interleave(builder, *(load(builder, row, I16, TILE_ROWS) for row in rows))
        builder.store(words, out, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _tile(builder: Builder, name: str, *arguments: Value) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)
