"""Activations as tiles read them: a row of float32 rounded to what products take, and laid beside others of its tile.

A tile is [k][rows] words, each of 1 float32, 2 bfloat16 or 4 bytes of successive k; for AMX [runs][rows][64 bytes].
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.hadamard import make_transform
from services.worker.engine.kernels.compiled.isa import Isa, has_bfloat16
from services.worker.engine.kernels.compiled.machine import floats, load_float32, store_float32, store_int32
from services.worker.engine.kernels.compiled.packing import padded_depth
from services.worker.engine.kernels.compiled.tiles import GROUP, RUN_BYTES
from services.worker.engine.kernels.compiled.vectors import (
    BF16,
    F32,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    absolute,
    at,
    call,
    constant,
    larger,
    largest_lane,
    load,
    pointer,
    splat,
    vector,
)

_RUN = 16  # float32 that are rounded to bfloat16 together


def make_put(isa: Isa, bits: int, depth: int) -> Any:
    """`put(values, count, first_k, row, rows, depth, x, scales, sums)` for products with weights of so many bits:
    stores `count` float32 at address `values` as tiles read them, from `first_k` of row `row` of `depth` k.

    `rows` rows stand side by side in a tile; `x` is the address of the first tile. Where `puts_whole_rows`, they are
    all of the row, whatever the arguments say of them, and after them there is memory for `put_scratch` more.
    """
    if bits == 8:
        return _make_put_row(isa, depth)
    if isa.uses_matrices(bits):
        return put_matrix
    return {32: put_floats, 16: put_pairs, 8: put_groups}[isa.activation_bits(bits)]


def puts_whole_rows(bits: int) -> bool:
    """Whether activations are rounded by the row, and so stored when it is complete, for weights of so many bits."""
    return bits == 8


def put_scratch(bits: int, depth: int) -> int:
    """How many float32 after the values `put` may overwrite."""
    return depth + padded_depth(depth, bits) if puts_whole_rows(bits) else 0


@intrinsic
def quantize_group(_: Any, values: Any, out: Any, word_stride: Any) -> Any:
    """GROUP float32 at an address as signed bytes, 4 in each word at `out`, words `word_stride` bytes apart.

    Returns the scale, a 127th of the largest magnitude, and the sum of the bytes.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        values, out, word_stride = arguments
        x = load(builder, pointer(builder, values), F32, GROUP)
        scale, inverse = _scale(builder, largest_lane(builder, absolute(builder, x)))
        numbers = _nearest(builder, x, inverse)
        total = call(builder, f"llvm.vector.reduce.add.v{GROUP}i32", I32, [numbers])
        words = builder.bitcast(builder.trunc(numbers, vector(I8, GROUP)), vector(I32, GROUP // 4))
        _store_words(builder, words, pointer(builder, out), word_stride)
        return context.make_tuple(builder, signature.return_type, [scale, total])

    return types.Tuple((types.float32, types.int32))(types.int64, types.int64, types.int64), generate


def _pairs(builder: Builder, values: Value) -> Value:
    """_RUN float32 at an address as words of two bfloat16, the first in the low half; nearest, ties to even."""
    x = load(builder, pointer(builder, values), F32, _RUN)
    if has_bfloat16():
        return builder.bitcast(builder.fptrunc(x, vector(BF16, _RUN)), vector(I32, _RUN // 2))
    # Without the instruction LLVM would call a function that is nowhere. As `bfloat16_bits`.
    bits = builder.bitcast(x, vector(I32, _RUN))
    odd = builder.and_(builder.lshr(bits, constant(I32, _RUN, 16)), constant(I32, _RUN, 1))
    rounded = builder.add(builder.add(bits, constant(I32, _RUN, 0x7FFF)), odd)
    high = builder.lshr(rounded, constant(I32, _RUN, 16))
    number = builder.select(builder.fcmp_unordered("uno", x, x), constant(I32, _RUN, 0x7FC0), high)
    return builder.bitcast(builder.trunc(number, vector(I16, _RUN)), vector(I32, _RUN // 2))


@intrinsic
def pair_run(_: Any, values: Any, out: Any) -> Any:
    """_RUN float32 at an address as _RUN / 2 adjoining words of two bfloat16 at `out`."""

    def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
        values, out = arguments
        builder.store(_pairs(builder, values), pointer(builder, out), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pair_run_apart(_: Any, values: Any, out: Any, word_stride: Any) -> Any:
    """As `pair_run`, but words lie `word_stride` bytes apart."""

    def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
        values, out, word_stride = arguments
        _store_words(builder, _pairs(builder, values), pointer(builder, out), word_stride)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(nogil=True, error_model="numpy")
def put_floats(values: int, count: int, first_k: int, row: int, rows: int, depth: int, x: int, _: int, __: int) -> None:
    """Stores `count` float32 at address `values` as tiles read them, from `first_k` of row `row` of `depth` k.

    `rows` rows stand side by side in a tile; `x` is the address of the first tile.
    """
    to = x + 4 * (row // rows * depth * rows + row % rows + first_k * rows)
    for k in range(count):
        store_float32(to + 4 * k * rows, load_float32(values + 4 * k))


@njit(nogil=True, error_model="numpy")
def put_pairs(values: int, count: int, first_k: int, row: int, rows: int, depth: int, x: int, _: int, __: int) -> None:
    """As `put_floats`, but rounded to bfloat16, two successive k in a word.

    `count` is a multiple of _RUN, `first_k` even.
    """
    to = x + 2 * (row // rows * depth * rows + first_k * rows) + 4 * (row % rows)
    for k in range(0, count, _RUN):
        if rows == 1:
            pair_run(values + 4 * k, to + 2 * k)
        else:
            pair_run_apart(values + 4 * k, to + 2 * k * rows, 4 * rows)


@njit(nogil=True, error_model="numpy")
def put_matrix(values: int, count: int, first_k: int, row: int, rows: int, depth: int, x: int, _: int, __: int) -> None:
    """As `put_pairs`, but in runs of GROUP k: a tile is [depth / GROUP][rows][GROUP].

    `first_k` is a multiple of _RUN.
    """
    to = x + 2 * (row // rows * depth * rows + row % rows * GROUP)
    for k in range(first_k, first_k + count, _RUN):
        pair_run(values + 4 * (k - first_k), to + 2 * (k // GROUP * GROUP * rows + k % GROUP))


@njit(nogil=True, error_model="numpy")
def put_groups(
    values: int, count: int, first_k: int, row: int, rows: int, depth: int, x: int, scales: int, sums: int
) -> None:
    """As `put_floats`, but quantized in groups; `count` and `first_k` are multiples of GROUP.

    `scales` and `sums` are the addresses of each group's scale and sum of bytes, as `nibble_panels` wants them.
    """
    tile, within = row // rows, row % rows
    to = x + (tile * depth + first_k) * rows + 4 * within
    place = 4 * ((tile * (depth // GROUP) + first_k // GROUP) * rows + within)
    for group in range(count // GROUP):
        scale, total = quantize_group(values + 4 * GROUP * group, to + group * GROUP * rows, 4 * rows)
        store_float32(scales + place + 4 * group * rows, scale)
        store_int32(sums + place + 4 * group * rows, total)


@cache
def _make_put_row(isa: Isa, depth: int) -> Any:
    deep, transform = padded_depth(depth, 8), make_transform(depth)
    quantize_runs, quantize_words = _quantize_row(adjoining=True), _quantize_row(adjoining=False)
    matrices = isa.matrices

    @njit(nogil=True, error_model="numpy")
    def put_row(
        values: int, count: int, first_k: int, row: int, rows: int, _: int, x: int, scales: int, sums: int
    ) -> None:
        """A whole row, transformed and quantized; one scale, and one sum of bytes, for each row."""
        temp = values + 4 * depth
        out = temp + 4 * depth
        transform(values, temp, out)
        if deep > depth:
            floats(out + 4 * depth, deep - depth)[:] = 0
        to, run_bytes = x + row // rows * deep * rows, RUN_BYTES * rows
        if matrices or rows == 1:
            scale, total = quantize_runs(out, deep // RUN_BYTES, to + row % rows * RUN_BYTES, run_bytes, 0)
        else:
            scale, total = quantize_words(out, deep // RUN_BYTES, to + row % rows * 4, run_bytes, 4 * rows)
        store_float32(scales + 4 * row, scale)
        store_int32(sums + 4 * row, total)

    return put_row


def _quantize_row(adjoining: bool) -> Any:
    """Intrinsic (values, runs, out, run_bytes, word_bytes): `runs` times RUN_BYTES float32 as signed bytes.

    From run to run they lie `run_bytes` apart, and within a run side by side or, where not `adjoining`, in words of 4
    that are `word_bytes` apart. Returns the scale, a 127th of the largest magnitude, and the sum of the bytes.
    """

    @intrinsic
    def quantize(_: Any, values: Any, runs: Any, out: Any, run_bytes: Any, word_bytes: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            values, runs, out, run_bytes, word_bytes = arguments
            source, to = pointer(builder, values), pointer(builder, out)
            most, sums = (cgutils.alloca_once(builder, vector(kind, RUN_BYTES)) for kind in (F32, I32))
            builder.store(constant(F32, RUN_BYTES, 0.0), most)
            builder.store(constant(I32, RUN_BYTES, 0), sums)

            def run_of(index: Value) -> Value:
                return load(builder, at(builder, source, builder.mul(index, I64(4 * RUN_BYTES))), F32, RUN_BYTES)

            with cgutils.for_range(builder, runs, intp=I64) as loop:
                builder.store(larger(builder, absolute(builder, run_of(loop.index)), builder.load(most)), most)
            scale, inverse = _scale(builder, largest_lane(builder, builder.load(most)))
            with cgutils.for_range(builder, runs, intp=I64) as loop:
                numbers = _nearest(builder, run_of(loop.index), inverse)
                builder.store(builder.add(builder.load(sums), numbers), sums)
                bytes_ = builder.trunc(numbers, vector(I8, RUN_BYTES))
                run = at(builder, to, builder.mul(loop.index, run_bytes))
                if adjoining:
                    builder.store(bytes_, run, align=1)
                else:
                    _store_words(builder, builder.bitcast(bytes_, vector(I32, RUN_BYTES // 4)), run, word_bytes)
            total = call(builder, f"llvm.vector.reduce.add.v{RUN_BYTES}i32", I32, [builder.load(sums)])
            # Of a row that is not finite nothing is finite once transformed, which no byte can say: so its scale does.
            first = builder.load(source, typ=F32)
            scale = builder.fadd(scale, builder.fsub(first, first))
            return context.make_tuple(builder, signature.return_type, [scale, total])

        return types.Tuple((types.float32, types.int32))(*[types.int64] * 5), generate

    return quantize


def _scale(builder: Builder, largest: Value) -> tuple[Value, Value]:
    """A 127th of the largest magnitude, and its inverse; 0 where that is 0."""
    zero, most = ir.Constant(F32, 0.0), ir.Constant(F32, 127.0)
    inverse = builder.select(builder.fcmp_ordered(">", largest, zero), builder.fdiv(most, largest), zero)
    return builder.fdiv(largest, most), inverse


def _nearest(builder: Builder, x: Value, inverse: Value) -> Value:
    """The int32 nearest to x * inverse, ties to even."""
    lanes = x.type.count
    scaled = builder.fmul(x, splat(builder, inverse, lanes))
    rounded = call(builder, f"llvm.rint.v{lanes}f32", scaled.type, [scaled])
    return builder.fptosi(rounded, vector(I32, lanes))


def _store_words(builder: Builder, words: Value, out: Value, word_bytes: Value) -> None:
    """Each int32 of a vector, `word_bytes` from one to the next."""
    for word in range(words.type.count):
        where = at(builder, out, builder.mul(word_bytes, I64(word)))
        builder.store(builder.extract_element(words, I32(word)), where, align=4)
