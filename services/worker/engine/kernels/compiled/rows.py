"""What is done to one row of activations at a time: norms, rotation, SwiGLU, and storing it as tiles read it.

Plain loops over float32, which LLVM turns into vector code. Sums are reassociated, always in the same way.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import float32, int32, njit, types
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import has_bfloat16
from services.worker.engine.kernels.compiled.machine import (
    float_bits,
    float_of_bits,
    load_float32,
    store_float32,
    store_int32,
)
from services.worker.engine.kernels.compiled.tiles import GROUP
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
    largest_lane,
    load,
    pointer,
    splat,
    vector,
)

Floats = npt.NDArray[np.float32]

_LOG2_E = float32(LOG2_E)
_LN2_HIGH, _LN2_LOW = float32(0.693359375), float32(-2.12194440e-4)  # Cephes' expf splits ln 2 in two
_LEAST, _MOST = float32(-87.0), float32(88.0)  # beyond, the exponent of e ** x leaves the range

_RUN = 16  # numbers that are handled together
_FAST = {"reassoc", "contract", "nsz", "arcp"}  # NaN and infinity stay what they are


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def exp(x: float) -> float:
    """e ** x, x being cut to -87..88, within 2 units in the last place; Cephes' expf. exp(0) is 1 exactly."""
    x = x if x > _LEAST else _LEAST
    x = x if x < _MOST else _MOST
    power = np.floor(x * _LOG2_E + float32(0.5))
    r = x - power * _LN2_HIGH - power * _LN2_LOW
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1.0)
    return p * float_of_bits((int32(power) + int32(127)) << int32(23))


@njit(nogil=True, error_model="numpy")
def copy(x: Floats, out: Floats) -> None:
    """out = x, in other memory. numba's own assignment asks whether they overlap, and then copies one by one."""
    for i in range(len(x)):
        out[i] = x[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def add(x: Floats, y: Floats, out: Floats) -> None:
    """out = x + y, in other memory than both: LLVM's vector code is for arrays that do not overlap."""
    for i in range(len(x)):
        out[i] = x[i] + y[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def add_to(total: Floats, x: Floats) -> None:
    """total += x."""
    for i in range(len(x)):
        total[i] += x[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = x / rms(x) * weight, over len(x); out may be x. Zhang & Sennrich 2019."""
    squares = float32(0.0)
    for i in range(len(x)):
        squares += x[i] * x[i]
    scale = float32(1.0) / np.sqrt(squares / float32(len(x)) + float32(eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def rotate(x: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary embedding in place; element i goes with i + len(x) / 2. cos and sin: len(x) / 2. Su et al. 2021."""
    half = len(cos)
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i] + a * sin[i]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def swiglu(gate: Floats, up: Floats, out: Floats) -> None:
    """out = silu(gate) * up. Shazeer 2020."""
    for i in range(len(out)):
        out[i] = gate[i] / (float32(1.0) + exp(-gate[i])) * up[i]


@njit(nogil=True, error_model="numpy")
def bfloat16_bits(x: float) -> Any:
    """The nearest bfloat16 as uint16, ties to even; NaN stays NaN."""
    if x != x:
        return np.uint16(0x7FC0)
    bits = float_bits(x)
    return np.uint16(((bits + int32(0x7FFF) + ((bits >> int32(16)) & int32(1))) >> int32(16)) & int32(0xFFFF))


@intrinsic
def quantize_group(_: Any, values: Any, out: Any, word_stride: Any) -> Any:
    """GROUP float32 at an address as signed bytes, 4 in each word at `out`, words `word_stride` bytes apart.

    Returns the scale, a 127th of the largest magnitude, and the sum of the bytes.
    """

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
        values, out, word_stride = arguments
        x = load(builder, pointer(builder, values), F32, GROUP)
        largest = largest_lane(builder, absolute(builder, x))
        zero, most = ir.Constant(F32, 0.0), ir.Constant(F32, 127.0)
        inverse = builder.select(builder.fcmp_ordered(">", largest, zero), builder.fdiv(most, largest), zero)
        scaled = builder.fmul(x, splat(builder, inverse, GROUP))
        rounded = call(builder, f"llvm.rint.v{GROUP}f32", scaled.type, [scaled])
        numbers = builder.fptosi(rounded, vector(I32, GROUP))
        total = call(builder, f"llvm.vector.reduce.add.v{GROUP}i32", I32, [numbers])
        words = builder.bitcast(builder.trunc(numbers, vector(I8, GROUP)), vector(I32, GROUP // 4))
        for word in range(GROUP // 4):
            where = at(builder, pointer(builder, out), builder.mul(word_stride, I64(word)))
            builder.store(builder.extract_element(words, I32(word)), where, align=4)
        scale = builder.fdiv(largest, most)
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
        words = _pairs(builder, values)
        for word in range(_RUN // 2):
            where = at(builder, pointer(builder, out), builder.mul(word_stride, I64(word)))
            builder.store(builder.extract_element(words, I32(word)), where, align=4)
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
def put_bytes(
    values: int, count: int, first_k: int, row: int, rows: int, depth: int, x: int, scales: int, sums: int
) -> None:
    """As `put_floats`, but quantized; `count` and `first_k` are multiples of GROUP.

    `scales` and `sums` are the addresses of each group's scale and sum of bytes, as `integer_panels` wants them.
    """
    tile, within = row // rows, row % rows
    to = x + (tile * depth + first_k) * rows + 4 * within
    place = 4 * ((tile * (depth // GROUP) + first_k // GROUP) * rows + within)
    for group in range(count // GROUP):
        scale, total = quantize_group(values + 4 * GROUP * group, to + group * GROUP * rows, 4 * rows)
        store_float32(scales + place + 4 * group * rows, scale)
        store_int32(sums + place + 4 * group * rows, total)
