"""The tiles of quantized products: exact integer sums within a group of k, which float32 scales then weigh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.tiles import FLOAT32, GROUP, FloatTile, panel_columns, panel_tile
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


def integer_panels(isa: Isa, rows: int, panels: int, bits: int) -> Any:
    """Intrinsic (activations, scales, sums, weights, weight_scales, panel_bytes, scale_bytes, groups, out,
    out_row_bytes, ahead): out = activations x panels, both quantized, in groups of GROUP successive k.

    activations are [k / 4][rows] words of 4 signed bytes; `scales`, float32, and `sums`, int32, of each group's bytes
    are [groups][rows]. Weights u are unsigned: 8-bit ones stand for d * (u - 128), 4-bit ones for d * u + m, with d and
    m float16 for each column and group: [groups][1 or 2][panel_columns] at `weight_scales`. Products are exact integers
    within a group; groups are summed in ascending order. `ahead` is as in `float_panels`.
    """
    tile = _IntegerTile(isa, rows, panels * isa.panel_columns // isa.lanes, bits)

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
            group_bytes = GROUP * bits // 8 * isa.panel_columns
            with cgutils.for_range(builder, groups, intp=I64) as loop:
                next_ = at(builder, pointer(builder, ahead), builder.mul(loop.index, I64(group_bytes)))
                fetch_lines(builder, next_, group_bytes)
                tile.add_group(builder, loop.index, totals, per_row, words, column_scales)
            tile.as_floats.write(builder, totals, pointer(builder, out), out_row_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return multiply


def byte_products(isa: Isa) -> Callable[[Builder, Value, Value, Value], Value]:
    """How tiles of 8-bit weights add: (builder, int32 sums, words of unsigned bytes, of signed bytes) to new sums."""
    return _IntegerTile(isa, rows=1, vectors=1, bits=8).multiply_bytes


@dataclass(frozen=True, slots=True)
class _IntegerTile:
    """One group's part of a tile of quantized rows and columns."""

    isa: Isa
    rows: int
    vectors: int
    bits: int

    @property
    def as_floats(self) -> FloatTile:
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
        of_group = builder.mul(index, I64(4 * self.rows))  # a group's first scale and sum
        products = self._products(builder, index, activations, sums, of_group, columns)
        kinds = 1 if self.bits == 8 else 2
        steps = builder.mul(index, I64(kinds * 2 * self.isa.panel_columns))
        step = [self._float16(builder, at(builder, column, steps)) for column in column_scales]
        if self.bits == 4:
            beyond = builder.add(steps, I64(2 * self.isa.panel_columns))
            least = [self._float16(builder, at(builder, column, beyond)) for column in column_scales]
        for row in range(self.rows):
            place = builder.add(of_group, I64(4 * row))
            scale = load_splat(builder, at(builder, scales, place), F32, lanes)
            if self.bits == 4:
                sum_ = load_splat(builder, at(builder, sums, place), I32, lanes)
                share = builder.fmul(builder.sitofp(sum_, vector(F32, lanes)), scale)
            for column, total in enumerate(totals[row]):
                product = builder.fmul(builder.sitofp(products[row][column], vector(F32, lanes)), scale)
                value = multiply_add(builder, product, step[column], builder.load(total))
                if self.bits == 4:
                    value = multiply_add(builder, share, least[column], value)
                builder.store(value, total)

    def _products(
        self, builder: Builder, index: Value, activations: Value, sums: Value, of_group: Value, columns: list[Value]
    ) -> list[list[Value]]:
        rows, lanes = self.rows, self.isa.lanes
        nothing = constant(I32, lanes, 0)
        products = [[nothing] * self.vectors for _ in range(rows)]
        if self.bits == 8 and not self.isa.byte_pairs:
            for row in range(rows):
                sum_ = load_splat(builder, at(builder, sums, builder.add(of_group, I64(4 * row))), I32, lanes)
                less = builder.sub(nothing, builder.shl(sum_, constant(I32, lanes, 7)))  # -128 * sum
                products[row] = [less] * self.vectors
        words = GROUP * self.bits // 32
        first_word = builder.mul(index, I64(words * 4 * self.isa.panel_columns))
        first_activation = builder.mul(index, I64(GROUP * rows))
        for word in range(words):
            offset = builder.add(first_word, I64(word * 4 * self.isa.panel_columns))
            parts = [
                self._unpack(builder, load(builder, at(builder, column, offset), I32, lanes)) for column in columns
            ]
            for part in range(8 // self.bits):
                for row in range(rows):
                    place = 4 * ((word * 8 // self.bits + part) * rows + row)
                    x = at(builder, activations, builder.add(first_activation, I64(place)))
                    xs = load_splat(builder, x, I32, lanes)
                    products[row] = [
                        self.multiply_bytes(builder, product, unpacked[part], xs)
                        for product, unpacked in zip(products[row], parts, strict=True)
                    ]
        if self.bits == 4 and self.isa.byte_pairs:
            return [[self._add_pairs(builder, nothing, product) for product in row] for row in products]
        return products

    def _unpack(self, builder: Builder, words: Value) -> list[Value]:
        """Words as vectors of 4 unsigned bytes per lane: low nibbles hold the first 4 k, high ones the next."""
        if self.bits == 8:
            return [words]
        mask = constant(I32, self.isa.lanes, 0x0F0F0F0F)
        high = builder.lshr(words, constant(I32, self.isa.lanes, 4))
        return [builder.and_(words, mask), builder.and_(high, mask)]

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
        return self._add_pairs(builder, total, builder.bitcast(pairs, total.type))

    def _add_pairs(self, builder: Builder, total: Value, pairs: Value) -> Value:
        """total + the sum of the two 16-bit numbers in each lane."""
        words = vector(I16, 2 * self.isa.lanes)
        ones = constant(I16, 2 * self.isa.lanes, 1)
        return builder.add(total, self._multiply_pairs(builder, builder.bitcast(pairs, words), ones))

    def _multiply_pairs(self, builder: Builder, a: Value, b: Value) -> Value:
        """The sums of the products of adjoining signed 16-bit numbers, in 32 bits."""
        lanes = self.isa.lanes
        names = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
        return call(builder, names[lanes], vector(I32, lanes), [a, b])

    def _float16(self, builder: Builder, where: Value) -> Value:
        """Finite float16 as float32."""
        lanes = self.isa.lanes
        if self.isa.name != "baseline":
            return builder.fpext(load(builder, where, F16, lanes), vector(F32, lanes))
        # Exponent and mantissa moved to their places in a float32 are too small by 2 ** (127 - 15).
        bits = builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))
        size = builder.shl(builder.and_(bits, constant(I32, lanes, 0x7FFF)), constant(I32, lanes, 13))
        scaled = builder.fmul(builder.bitcast(size, vector(F32, lanes)), constant(F32, lanes, 2.0**112))
        sign = builder.shl(builder.and_(bits, constant(I32, lanes, 0x8000)), constant(I32, lanes, 16))
        return builder.bitcast(builder.or_(builder.bitcast(scaled, vector(I32, lanes)), sign), vector(F32, lanes))
