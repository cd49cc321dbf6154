"""The tiles of quantized products: exact integer sums, of all k or of a group, which float32 scales then weigh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.tiles import (
    FLOAT32,
    GROUP,
    Tile,
    WeightFormat,
    load_words,
    panel_columns,
    panel_tile,
)
from services.worker.engine.kernels.compiled.vectors import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    at,
    call,
    constant,
    fetch_lines,
    load,
    load_splat,
    multiply_add,
    pointer,
    vector,
)


def byte_panels(isa: Isa, rows: int, panels: int) -> Any:
    """Intrinsic (activations, scales, sums, weights, weight_scales, panel_bytes, scale_bytes, words, out,
    out_row_bytes, ahead): out = activations x panels, both of 8 bits.

    activations are [words][rows] words of 4 signed bytes; `scales`, float32, and `sums`, int32, of a row's bytes are
    [rows]. Weights u are unsigned and stand for d * (u - 128), with a float32 d for each column at `weight_scales`.
    Sums are exact as long as int32 holds them, which it does up to 133,000 k. `ahead` is as in `float_panels`.
    """
    multiply_bytes = byte_products(isa)
    as_words = WeightFormat(4, 1, load_words, 1, I32, lambda builder, total, x, u: multiply_bytes(builder, total, u, x))
    tile = panel_tile(isa, rows, panels, as_words)
    lanes, row_bytes = isa.lanes, 4 * isa.panel_columns

    @intrinsic
    def multiply(
        _: Any, activations: Any, scales: Any, sums: Any, weights: Any, weight_scales: Any, panel_bytes: Any,
        scale_bytes: Any, words: Any, out: Any, out_row_bytes: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            activations, scales, sums, weights, weight_scales, panel_bytes, scale_bytes, words, *rest = arguments
            out, out_row_bytes, ahead = rest
            columns = panel_columns(builder, isa, panels, weights, panel_bytes)
            x, row_sums, row_scales = (pointer(builder, each) for each in (activations, sums, scales))
            totals = []
            for row in range(rows):
                begin = constant(I32, lanes, 0)
                if not isa.byte_pairs:
                    begin = less_offset(builder, begin, at(builder, row_sums, I64(4 * row)))
                totals.append([cgutils.alloca_once(builder, begin.type) for _ in range(tile.vectors)])
                for total in totals[row]:
                    builder.store(begin, total)
            tile.accumulate(builder, totals, x, columns, row_bytes, words, unroll=2, ahead=pointer(builder, ahead))
            steps = [
                load(builder, column, F32, lanes)
                for column in panel_columns(builder, isa, panels, weight_scales, scale_bytes)
            ]
            for row in range(rows):
                for index, (total, step) in enumerate(zip(totals[row], steps, strict=True)):
                    value = scaled(builder, builder.load(total), at(builder, row_scales, I64(4 * row)), step)
                    place = builder.add(builder.mul(out_row_bytes, I64(row)), I64(4 * lanes * index))
                    builder.store(value, at(builder, pointer(builder, out), place), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return multiply


def less_offset(builder: Builder, sums: Value, row_sum: Value) -> Value:
    """int32 sums of products with u, of weights that stand for u - 128, less 128 times what is at `row_sum`."""
    lanes = sums.type.count
    offset = builder.shl(load_splat(builder, row_sum, I32, lanes), constant(I32, lanes, 7))
    return builder.sub(sums, offset)


def scaled(builder: Builder, sums: Value, row_scale: Value, column_scales: Value) -> Value:
    """int32 sums as float32, by their columns' scales and that of the row, which is at `row_scale`."""
    lanes = sums.type.count
    scales = builder.fmul(load_splat(builder, row_scale, F32, lanes), column_scales)
    return builder.fmul(builder.sitofp(sums, vector(F32, lanes)), scales)


def byte_products(isa: Isa) -> Callable[[Builder, Value, Value, Value], Value]:
    """How tiles of 8-bit weights add: (builder, int32 sums, words of unsigned bytes, of signed bytes) to new sums."""
    return _Products(isa, bits=8).multiply_bytes


def nibble_panels(isa: Isa, rows: int, panels: int) -> Any:
    """Intrinsic (activations, scales, sums, weights, weight_scales, panel_bytes, scale_bytes, groups, out,
    out_row_bytes, ahead): out = activations of 8 bits x panels of 4, both in groups of GROUP successive k.

    activations are [k / 4][rows] words of 4 signed bytes; `scales`, float32, and `sums`, int32, of each group's bytes
    are [groups][rows]. Weights u are unsigned and stand for d * u + m, with d and m float16 for each column and group:
    [groups][2][panel_columns] at `weight_scales`. Products are exact integers within a group; groups are summed in
    ascending order. `ahead` is as in `float_panels`.
    """
    tile = _NibbleTile(isa, rows, panels * isa.panel_columns // isa.lanes)

    @intrinsic
    def multiply(
        _: Any, activations: Any, scales: Any, sums: Any, weights: Any, weight_scales: Any, panel_bytes: Any,
        scale_bytes: Any, groups: Any, out: Any, out_row_bytes: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            activations, scales, sums, weights, weight_scales, panel_bytes, scale_bytes, groups, *rest = arguments
            out, out_row_bytes, ahead = rest
            words = panel_columns(builder, isa, panels, weights, panel_bytes)
            column_scales = panel_columns(builder, isa, panels, weight_scales, scale_bytes, lane_bytes=2)
            per_row = [pointer(builder, each) for each in (activations, scales, sums)]
            totals = tile.as_floats.zeros(builder)
            group_bytes = GROUP // 2 * isa.panel_columns
            with cgutils.for_range(builder, groups, intp=I64) as loop:
                next_ = at(builder, pointer(builder, ahead), builder.mul(loop.index, I64(group_bytes)))
                fetch_lines(builder, next_, group_bytes)
                tile.add_group(builder, loop.index, totals, per_row, words, column_scales)
            tile.as_floats.write(builder, totals, pointer(builder, out), out_row_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return multiply


@dataclass(frozen=True, slots=True)
class _NibbleTile:
    """One group's part of a tile of quantized rows and columns."""

    isa: Isa
    rows: int
    vectors: int

    @property
    def as_floats(self) -> Tile:
        return panel_tile(self.isa, self.rows, self.vectors * self.isa.lanes // self.isa.panel_columns, FLOAT32)

    def add_group(
        self,
        builder: Builder,
        index: Value,
        totals: list[list[Value]],
        per_row: list[Value],
        columns: list[Value],
        column_scales: list[Value],
    ) -> None:
        """Adds the exact integer product of one group's bytes, scaled, to the float32 totals."""
        activations, scales, sums = per_row
        lanes = self.isa.lanes
        products = self._products(builder, index, activations, columns)
        steps = builder.mul(index, I64(2 * 2 * self.isa.panel_columns))
        beyond = builder.add(steps, I64(2 * self.isa.panel_columns))
        step, least = (
            [_float16(builder, self.isa, at(builder, column, place)) for column in column_scales]
            for place in (steps, beyond)
        )
        for row in range(self.rows):
            place = builder.add(builder.mul(index, I64(4 * self.rows)), I64(4 * row))
            scale = load_splat(builder, at(builder, scales, place), F32, lanes)
            sum_ = load_splat(builder, at(builder, sums, place), I32, lanes)
            share = builder.fmul(builder.sitofp(sum_, vector(F32, lanes)), scale)
            for column, total in enumerate(totals[row]):
                product = builder.fmul(builder.sitofp(products[row][column], vector(F32, lanes)), scale)
                value = multiply_add(builder, product, step[column], builder.load(total))
                builder.store(multiply_add(builder, share, least[column], value), total)

    def _products(self, builder: Builder, index: Value, activations: Value, columns: list[Value]) -> list[list[Value]]:
        rows, lanes, arithmetic = self.rows, self.isa.lanes, _Products(self.isa, bits=4)
        nothing = constant(I32, lanes, 0)
        products = [[nothing] * self.vectors for _ in range(rows)]
        words = GROUP // 8
        first_word = builder.mul(index, I64(words * 4 * self.isa.panel_columns))
        first_activation = builder.mul(index, I64(GROUP * rows))
        for word in range(words):
            offset = builder.add(first_word, I64(word * 4 * self.isa.panel_columns))
            parts = [
                _unpack_nibbles(builder, load(builder, at(builder, column, offset), I32, lanes)) for column in columns
            ]
            for part in range(2):
                for row in range(rows):
                    place = 4 * ((word * 2 + part) * rows + row)
                    x = at(builder, activations, builder.add(first_activation, I64(place)))
                    xs = load_splat(builder, x, I32, lanes)
                    products[row] = [
                        arithmetic.multiply_bytes(builder, product, unpacked[part], xs)
                        for product, unpacked in zip(products[row], parts, strict=True)
                    ]
        if self.isa.byte_pairs:
            return [[arithmetic.add_pairs(builder, nothing, product) for product in row] for row in products]
        return products


def _unpack_nibbles(builder: Builder, words: Value) -> list[Value]:
    """Words as vectors of 4 unsigned bytes per lane: low nibbles hold the first 4 k, high ones the next."""
    lanes = words.type.count
    mask = constant(I32, lanes, 0x0F0F0F0F)
    return [builder.and_(words, mask), builder.and_(builder.lshr(words, constant(I32, lanes, 4)), mask)]


@dataclass(frozen=True, slots=True)
class _Products:
    """Of vectors of bytes with vectors of weights of 8 or 4 bits."""

    isa: Isa
    bits: int

    def multiply_bytes(self, builder: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
        """total + the sum of the 4 products of unsigned and signed bytes, in each 32-bit lane.

        With `byte_pairs` each lane of 4-bit weights is two 16-bit sums: those of a group stay below
        8 * 2 * 15 * 127 < 2**15. Products with 8-bit weights are then those with u - 128.
        """
        lanes = self.isa.lanes
        if self.isa.vnni:
            return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, [total, unsigned, signed])
        if self.isa.byte_pairs:
            return self._multiply_byte_pairs(builder, total, unsigned, signed)
        wide = vector(I16, 2 * lanes)
        eight = constant(I16, 2 * lanes, 8)
        u, s = builder.bitcast(unsigned, wide), builder.bitcast(signed, wide)
        even = self._multiply_pairs(
            builder, builder.and_(u, constant(I16, 2 * lanes, 0xFF)), builder.ashr(builder.shl(s, eight), eight)
        )
        odd = self._multiply_pairs(builder, builder.lshr(u, eight), builder.ashr(s, eight))
        return builder.add(total, builder.add(even, odd))

    def _multiply_byte_pairs(self, builder: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
        lanes = self.isa.lanes
        bytes_, words = vector(I8, 4 * lanes), vector(I16, 2 * lanes)
        u, s = builder.bitcast(unsigned, bytes_), builder.bitcast(signed, bytes_)
        if self.bits == 4:
            pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [u, s])
            return builder.bitcast(builder.add(builder.bitcast(total, words), pairs), total.type)
        # One side has to be unsigned: |s| * (sign of s * weight), as in ggml's dot products. Pairs fit: 2 * 127 * 127.
        weight = builder.xor(u, constant(I8, 4 * lanes, 128))
        turned = call(builder, "llvm.x86.avx2.psign.b", bytes_, [weight, s])
        size = call(builder, f"llvm.abs.v{4 * lanes}i8", bytes_, [s, I1(0)])
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, [size, turned])
        return self.add_pairs(builder, total, builder.bitcast(pairs, total.type))

    def add_pairs(self, builder: Builder, total: Value, pairs: Value) -> Value:
        """total + the sum of the two 16-bit numbers in each lane."""
        words = vector(I16, 2 * self.isa.lanes)
        ones = constant(I16, 2 * self.isa.lanes, 1)
        return builder.add(total, self._multiply_pairs(builder, builder.bitcast(pairs, words), ones))

    def _multiply_pairs(self, builder: Builder, a: Value, b: Value) -> Value:
        """The sums of the products of adjoining signed 16-bit numbers, in 32 bits."""
        lanes = self.isa.lanes
        names = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
        return call(builder, names[lanes], vector(I32, lanes), [a, b])


def _float16(builder: Builder, isa: Isa, where: Value) -> Value:
    """Finite float16 as float32."""
    lanes = isa.lanes
    if isa.name != "baseline":
        return builder.fpext(load(builder, where, F16, lanes), vector(F32, lanes))
    # Exponent and mantissa moved to their places in a float32 are too small by 2 ** (127 - 15).
    bits = builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))
    size = builder.shl(builder.and_(bits, constant(I32, lanes, 0x7FFF)), constant(I32, lanes, 13))
    scaled = builder.fmul(builder.bitcast(size, vector(F32, lanes)), constant(F32, lanes, 2.0**112))
    sign = builder.shl(builder.and_(bits, constant(I32, lanes, 0x8000)), constant(I32, lanes, 16))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, vector(I32, lanes)), sign), vector(F32, lanes))
