"""LLVM vector code in Python: the few operations that tiles are written with. Knows nothing of matrices."""

import math
from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir

Builder = Any  # llvmlite is untyped
Value = Any

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class _BFloat16(ir.HalfType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()
BF16 = _BFloat16()
POINTER = ir.PointerType()
LOG2_E = math.log2(math.e)
_LINE_BYTES = 64

# Of 2 ** x in -0.5..0.5, the highest power first: within a float32's last places, and within 1e-7.
_POWER_SERIES = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
_SHORT_SERIES = (
    1.3264723820611835e-3,
    9.671518579125404e-3,
    5.550733953714371e-2,
    2.4022242426872253e-1,
    6.931470036506653e-1,
    1.0,
)


def vector(element: Any, lanes: int) -> Any:
    return ir.VectorType(element, lanes)


def constant(element: Any, lanes: int, value: float) -> Value:
    """A vector of `lanes` equal elements."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def at(builder: Builder, base: Value, byte_offset: Value) -> Value:
    """The pointer `byte_offset` after `base`."""
    return builder.gep(base, [byte_offset], source_etype=I8)


def pointer(builder: Builder, address: Value) -> Value:
    return builder.inttoptr(address, POINTER)


def load(builder: Builder, where: Value, element: Any, lanes: int) -> Value:
    """A vector from memory that need not be aligned beyond its elements."""
    return builder.load(where, typ=vector(element, lanes), align=max(1, _bytes(element)))


def splat(builder: Builder, scalar: Value, lanes: int) -> Value:
    """The scalar in every lane."""
    kind = vector(scalar.type, lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, constant(I32, lanes, 0))


def load_splat(builder: Builder, where: Value, element: Any, lanes: int) -> Value:
    return splat(builder, builder.load(where, typ=element, align=_bytes(element)), lanes)


def call(builder: Builder, name: str, result: Any, arguments: Sequence[Value], fastmath: Sequence[str] = ()) -> Value:
    """Calls an LLVM intrinsic or a C function by name."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)


def multiply_add(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """a * b + c for float32 vectors; one instruction, rounded once, where the machine has it."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, [a, b, c])


def add_pair_products(builder: Builder, total: Value, a: Value, b: Value) -> Value:
    """total + the sum of the 2 products of the bfloat16s in each word of a and b: AVX-512 BF16's vdpbf16ps.

    Sums are rounded to nearest after each product; subnormal numbers count as zero.
    """
    lanes = a.type.count
    pairs = vector(BF16, 2 * lanes)
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    return call(builder, name, total.type, [total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])


def interleave(builder: Builder, a: Value, b: Value) -> Value:
    """a[0], b[0], a[1], b[1], ... as one vector."""
    lanes = a.type.count
    order = [lane // 2 + (lane % 2) * lanes for lane in range(2 * lanes)]
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, 2 * lanes), order))


def power_of_two(builder: Builder, x: Value) -> Value:
    """2 ** x of float32 at most 0, within 2 units in the last place; Cephes' exp2f. Below -126 it is 0."""
    lanes = x.type.count
    whole = call(builder, f"llvm.rint.v{lanes}f32", x.type, [x])
    rest = builder.fsub(x, whole)
    power = _series(builder, _POWER_SERIES, rest)
    exponent = builder.shl(builder.fptosi(whole, vector(I32, lanes)), constant(I32, lanes, 23))
    scaled = builder.bitcast(builder.add(builder.bitcast(power, exponent.type), exponent), x.type)
    vanishes = builder.fcmp_ordered("<", x, constant(F32, lanes, -126.0))
    return builder.select(vanishes, constant(F32, lanes, 0.0), scaled)


def short_power_of_two(builder: Builder, x: Value) -> Value:
    """2 ** x of 16 float32, within 2e-7 of it, which does for what is rounded to bfloat16. Needs AVX-512."""
    rest = _masked(builder, "reduce", x, I32(0))  # from the nearest whole number
    return _masked(builder, "scalef", _series(builder, _SHORT_SERIES, rest), builder.fsub(x, rest))


def reciprocal(builder: Builder, x: Value) -> Value:
    """1 / x of 16 float32 that are neither tiny nor huge, within 2 units in the last place. Needs AVX-512."""
    lanes = x.type.count
    every = ir.Constant(I16, 0xFFFF)
    near = call(builder, "llvm.x86.avx512.rcp14.ps.512", x.type, [x, constant(F32, lanes, 0.0), every])
    error = multiply_add(builder, builder.fneg(x), near, constant(F32, lanes, 1.0))
    return multiply_add(builder, near, error, near)


def _series(builder: Builder, coefficients: Sequence[float], x: Value) -> Value:
    lanes = x.type.count
    total = constant(F32, lanes, coefficients[0])
    for coefficient in coefficients[1:]:
        total = multiply_add(builder, total, x, constant(F32, lanes, coefficient))
    return total


def _masked(builder: Builder, name: str, x: Value, operand: Value) -> Value:
    """An AVX-512 instruction of two operands, on all lanes, rounding as is usual."""
    nothing, every, rounding = constant(F32, x.type.count, 0.0), ir.Constant(I16, 0xFFFF), I32(4)
    arguments = [x, operand, nothing, every, rounding]
    return call(builder, f"llvm.x86.avx512.mask.{name}.ps.512", x.type, arguments)


def sum_of_lanes(builder: Builder, x: Value) -> Value:
    """In an order that is always the same."""
    return call(builder, f"llvm.vector.reduce.fadd.v{x.type.count}f32", F32, [ir.Constant(F32, -0.0), x], ("reassoc",))


def fetch_lines(builder: Builder, first: Value, size: int) -> None:
    """Has the second-level cache fetch the lines of `size` bytes. It is a hint: no memory need be there.

    Into the first level they would come through the few buffers that loads need, too, and push out what is in use.
    """
    for offset in range(0, size, _LINE_BYTES):
        where = at(builder, first, I64(offset))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [where, I32(0), I32(2), I32(1)])  # to read, level 2, data


def absolute(builder: Builder, x: Value) -> Value:
    bits = builder.bitcast(x, vector(I32, x.type.count))
    return builder.bitcast(builder.and_(bits, constant(I32, x.type.count, 0x7FFFFFFF)), x.type)


def larger(builder: Builder, x: Value, y: Value) -> Value:
    """The larger of each lane; y where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def largest_lane(builder: Builder, x: Value) -> Value:
    """Not NaN, if any lane is none. LLVM's own reduction looks for NaN lane by lane."""
    while x.type.count > 1:
        half = x.type.count // 2
        low, high = (
            builder.shuffle_vector(x, x, ir.Constant(vector(I32, half), [first + lane for lane in range(half)]))
            for first in (0, half)
        )
        x = larger(builder, low, high)
    return builder.extract_element(x, I32(0))


def _bytes(element: Any) -> int:
    return {I8: 1, I16: 2, F16: 2, I32: 4, F32: 4}[element]
