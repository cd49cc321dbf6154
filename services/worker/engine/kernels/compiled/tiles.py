"""Tiles: the inner loops of matrix products, as LLVM vector code behind numba intrinsics.

A tile multiplies `rows` rows of activations by some columns of weights (or of keys, or of values), with one vector
accumulator for each row and vector of columns, all in registers. An output is summed over k in ascending order whatever
the tile's shape, so that a row's result does not depend on how many rows are computed together.

Layouts (see `packing`): activations are [k][rows] float32, a tile's rows side by side, or [k / 2][rows] words of two
bfloat16; weights are panels of [k / per_word][panel_columns] 32-bit words, each holding `per_word` successive k of one
column. Attention has its activations row after row instead, and its keys and values as plain rows of each k. The
addresses that the intrinsics take are integers; whoever calls answers for their bounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.vectors import (
    F16,
    F32,
    I16,
    I32,
    I64,
    Builder,
    Value,
    add_pair_products,
    at,
    call,
    constant,
    fetch_lines,
    interleave,
    load,
    load_splat,
    multiply_add,
    pointer,
    vector,
)

GROUP = 32  # successive k that share a scale in quantized weights and activations


def _multiply_floats(builder: Builder, total: Value, x: Value, weight: Value) -> Value:
    return multiply_add(builder, x, weight, total)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """How weights of a floating-point type lie in memory, and how they meet activations.

    A step of the loop over k takes `depth` rows of memory; a vector of them is decoded to `parts` vectors, one for each
    successive word of activations.
    """

    element_bytes: int  # of a lane in memory
    parts: int
    decode: Callable[[Builder, Value, int, int], list[Value]]  # (where, lanes, bytes between rows of memory)
    depth: int = 1
    activation: Any = F32  # what is loaded of a row for each part
    multiply: Callable[[Builder, Value, Value, Value], Value] = _multiply_floats  # (total, activation, weight)


def _decode_float32(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    return [load(builder, where, F32, lanes)]


def _decode_bfloat16(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    halves = builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))
    return [builder.bitcast(builder.shl(halves, constant(I32, lanes, 16)), vector(F32, lanes))]


def _decode_bfloat16_pairs(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    words = load(builder, where, I32, lanes)
    even = builder.shl(words, constant(I32, lanes, 16))
    odd = builder.and_(words, constant(I32, lanes, 0xFFFF0000))
    return [builder.bitcast(part, vector(F32, lanes)) for part in (even, odd)]


def _load_words(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    return [load(builder, where, I32, lanes)]


def _pair_rows(builder: Builder, where: Value, lanes: int, row_bytes: int) -> list[Value]:
    """Words of two bfloat16, one of each of two rows."""
    first, second = load(builder, where, I16, lanes), load(builder, at(builder, where, I64(row_bytes)), I16, lanes)
    return [builder.bitcast(interleave(builder, first, second), vector(I32, lanes))]


def _pair_with_zero(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    return [builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))]


FLOAT32 = FloatFormat(4, 1, _decode_float32)
BFLOAT16_PAIRS = FloatFormat(4, 2, _decode_bfloat16_pairs)  # packed weights
BFLOAT16_DOTS = FloatFormat(4, 1, _load_words, 1, I32, add_pair_products)  # the same, with activations in pairs as well
BFLOAT16_ROWS = FloatFormat(2, 1, _decode_bfloat16)  # keys and values
BFLOAT16_ROW_DOTS = FloatFormat(2, 1, _pair_rows, 2, I32, add_pair_products)  # the same, with activations in pairs
_LAST_ROW = replace(BFLOAT16_ROW_DOTS, decode=_pair_with_zero)  # which has no other to go with


@dataclass(frozen=True, slots=True)
class _FloatTile:
    """The loop over k of one tile: `rows` times `vectors` accumulators."""

    lanes: int
    rows: int
    vectors: int
    format: FloatFormat
    x_row_bytes: int  # from a row's activation to the next row's
    x_word_bytes: int  # and to the row's next

    def zeros(self, builder: Builder) -> list[list[Value]]:
        zero = constant(F32, self.lanes, 0.0)
        return [[cgutils.alloca_once_value(builder, zero) for _ in range(self.vectors)] for _ in range(self.rows)]

    def accumulate(
        self,
        builder: Builder,
        sums: list[list[Value]],
        activations: Value,
        columns: list[Value],
        row_bytes: int,
        steps: Value,
        unroll: int,
        ahead: Value | None = None,
    ) -> None:
        """Adds `steps` steps over k. `columns` point at each vector's first row, of rows `row_bytes` apart.

        Meanwhile as many bytes from `ahead` as the rows have are fetched into the cache.
        """
        parts, lanes = self.format.parts, self.lanes
        step_bytes = self.format.depth * row_bytes
        with cgutils.for_range(builder, builder.udiv(steps, I64(unroll)), intp=I64) as loop:
            weight_offset = builder.mul(loop.index, I64(step_bytes * unroll))
            x_offset = builder.mul(loop.index, I64(self.x_word_bytes * parts * unroll))
            if ahead is not None:
                fetch_lines(builder, at(builder, ahead, weight_offset), step_bytes * unroll)
            for step in range(unroll):
                offset = builder.add(weight_offset, I64(step * step_bytes))
                places = [at(builder, column, offset) for column in columns]
                decoded = [self.format.decode(builder, place, lanes, row_bytes) for place in places]
                for part in range(parts):
                    for row in range(self.rows):
                        place = (step * parts + part) * self.x_word_bytes + row * self.x_row_bytes
                        where = at(builder, activations, builder.add(x_offset, I64(place)))
                        x = load_splat(builder, where, self.format.activation, lanes)
                        for index, sum_ in enumerate(sums[row]):
                            total = self.format.multiply(builder, builder.load(sum_), x, decoded[index][part])
                            builder.store(total, sum_)

    def write(self, builder: Builder, sums: list[list[Value]], out: Value, row_bytes: Value) -> None:
        for sum_, where in self._places(builder, sums, out, row_bytes):
            builder.store(builder.load(sum_), where, align=4)

    def read(self, builder: Builder, sums: list[list[Value]], source: Value, row_bytes: Value) -> None:
        """Begins with what `write` left."""
        for sum_, where in self._places(builder, sums, source, row_bytes):
            builder.store(load(builder, where, F32, self.lanes), sum_)

    def _places(
        self, builder: Builder, sums: list[list[Value]], base: Value, row_bytes: Value
    ) -> Iterator[tuple[Value, Value]]:
        for row in range(self.rows):
            for index, sum_ in enumerate(sums[row]):
                offset = builder.add(builder.mul(row_bytes, I64(row)), I64(4 * self.lanes * index))
                yield sum_, at(builder, base, offset)


def _panel_tile(isa: Isa, rows: int, panels: int, weights: FloatFormat) -> _FloatTile:
    return _FloatTile(isa.lanes, rows, panels * isa.panel_columns // isa.lanes, weights, 4, 4 * rows)


def float_panels(isa: Isa, rows: int, panels: int, weights: FloatFormat) -> Any:
    """Intrinsic (activations, weights, panel_bytes, words, out, out_row_bytes, ahead): out = activations x panels.

    `panels` adjoining panels, `panel_bytes` apart, each of `words` words of k (an even number); out is
    [rows][panels * panel_columns] within rows of `out_row_bytes`. A panel's worth of bytes at `ahead` is fetched into
    the cache meanwhile; no memory need be there.
    """
    tile = _panel_tile(isa, rows, panels, weights)

    @intrinsic
    def multiply(
        _: Any, activations: Any, weights: Any, panel_bytes: Any, words: Any, out: Any, out_row_bytes: Any, ahead: Any
    ) -> Any:
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            activations, weights, panel_bytes, words, out, out_row_bytes, ahead = arguments
            sums = tile.zeros(builder)
            columns = _panel_columns(builder, isa, panels, weights, panel_bytes)
            row_bytes = 4 * isa.panel_columns
            x, beyond = pointer(builder, activations), pointer(builder, ahead)
            tile.accumulate(builder, sums, x, columns, row_bytes, words, unroll=2, ahead=beyond)
            tile.write(builder, sums, pointer(builder, out), out_row_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


def query_keys(
    isa: Isa, rows: int, blocks: int, *, head_dim: int, block_size: int, out_tokens: int, keys: FloatFormat
) -> Any:
    """Intrinsic (queries, base, table, left, block_bytes, out): the scores of `blocks` blocks of keys.

    queries is [rows][head_dim], in the format's words; a block's keys are [head_dim][block_size] at
    base + table[i] * block_bytes, `table` the address of int32s of which `left` are left: beyond them the last one is
    taken again. out is [rows][blocks * block_size] within rows of `out_tokens`.
    """
    vectors = block_size // isa.lanes
    tile = _FloatTile(isa.lanes, rows, blocks * vectors, keys, 4 // keys.depth * head_dim, 4)

    @intrinsic
    def score(_: Any, queries: Any, base: Any, table: Any, left: Any, block_bytes: Any, out: Any) -> Any:
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            queries, base, table, left, block_bytes, out = arguments
            columns = []
            for block in range(blocks):
                last = builder.sub(left, I64(1))
                index = builder.select(builder.icmp_signed("<", I64(block), left), I64(block), last)
                start = _block(builder, base, table, index, block_bytes)
                columns += [at(builder, start, I64(v * isa.lanes * keys.element_bytes)) for v in range(vectors)]
            sums = tile.zeros(builder)
            row_bytes, steps = block_size * keys.element_bytes, I64(head_dim // keys.depth)
            tile.accumulate(builder, sums, pointer(builder, queries), columns, row_bytes, steps, unroll=2)
            tile.write(builder, sums, pointer(builder, out), I64(4 * out_tokens))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return score


def weigh_values(
    isa: Isa, rows: int, vectors: int, *, head_dim: int, block_size: int, weight_tokens: int, values: FloatFormat
) -> Any:
    """Intrinsic (weights, base, table, block_bytes, tokens, out): out += weights x values.

    weights is [rows][tokens], in the format's words, within rows of `weight_tokens` float32; where they are pairs, one
    more token has weights, which are finite. A block's values are [block_size][head_dim] at
    base + table[i] * block_bytes; `base` points at the first of the `vectors` vectors of columns that are computed. out
    is [rows][vectors * lanes] within rows of `head_dim`. Only `tokens` tokens' values are read.
    """
    tile = _FloatTile(isa.lanes, rows, vectors, values, 4 * weight_tokens, 4)
    depth, row_bytes = values.depth, head_dim * values.element_bytes

    @intrinsic
    def weigh(_: Any, weights: Any, base: Any, table: Any, block_bytes: Any, tokens: Any, out: Any) -> Any:
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            weights, base, table, block_bytes, tokens, out = arguments
            sums = tile.zeros(builder)
            tile.read(builder, sums, pointer(builder, out), I64(4 * head_dim))

            def add_block(tile: _FloatTile, index: Value, token: Value, steps: Value, unroll: int) -> None:
                start = at(
                    builder, _block(builder, base, table, index, block_bytes), builder.mul(token, I64(row_bytes))
                )
                columns = [at(builder, start, I64(v * isa.lanes * values.element_bytes)) for v in range(vectors)]
                before = builder.add(builder.mul(index, I64(block_size)), token)
                first = pointer(builder, builder.add(weights, builder.mul(before, I64(4 // depth))))
                tile.accumulate(builder, sums, first, columns, row_bytes, steps, unroll)

            whole, rest = builder.udiv(tokens, I64(block_size)), builder.urem(tokens, I64(block_size))
            with cgutils.for_range(builder, whole, intp=I64) as loop:
                add_block(tile, loop.index, I64(0), I64(block_size // depth), unroll=2)
            with builder.if_then(builder.icmp_unsigned(">=", rest, I64(depth))):
                add_block(tile, whole, I64(0), builder.udiv(rest, I64(depth)), unroll=1)
            if depth == 2:
                odd = builder.and_(rest, I64(1))
                with builder.if_then(builder.icmp_unsigned(">", odd, I64(0))):
                    add_block(replace(tile, format=_LAST_ROW), whole, builder.sub(rest, I64(1)), I64(1), unroll=1)
            tile.write(builder, sums, pointer(builder, out), I64(4 * head_dim))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return weigh


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
            words = _panel_columns(builder, isa, panels, weights, panel_bytes)
            column_scales = _panel_columns(builder, isa, panels, weight_scales, scale_bytes, lane_bytes=2)
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


@dataclass(frozen=True, slots=True)
class _IntegerTile:
    """One group's part of a tile of quantized rows and columns."""

    isa: Isa
    rows: int
    vectors: int
    bits: int

    @property
    def as_floats(self) -> _FloatTile:
        return _panel_tile(self.isa, self.rows, self.vectors * self.isa.lanes // self.isa.panel_columns, FLOAT32)

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
        if self.bits == 8:
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
                        self._multiply_bytes(builder, product, unpacked[part], xs)
                        for product, unpacked in zip(products[row], parts, strict=True)
                    ]
        return products

    def _unpack(self, builder: Builder, words: Value) -> list[Value]:
        """Words as vectors of 4 unsigned bytes per lane: low nibbles hold the first 4 k, high ones the next."""
        if self.bits == 8:
            return [words]
        mask = constant(I32, self.isa.lanes, 0x0F0F0F0F)
        high = builder.lshr(words, constant(I32, self.isa.lanes, 4))
        return [builder.and_(words, mask), builder.and_(high, mask)]

    def _multiply_bytes(self, builder: Builder, total: Value, unsigned: Value, signed: Value) -> Value:
        """total + the sum of the 4 products of unsigned and signed bytes, in each 32-bit lane."""
        lanes = self.isa.lanes
        if self.isa.vnni:
            return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, [total, unsigned, signed])
        wide = vector(I16, 2 * lanes)
        eight = constant(I16, 2 * lanes, 8)
        u, s = builder.bitcast(unsigned, wide), builder.bitcast(signed, wide)
        even = self._multiply_pairs(
            builder, builder.and_(u, constant(I16, 2 * lanes, 0xFF)), builder.ashr(builder.shl(s, eight), eight)
        )
        odd = self._multiply_pairs(builder, builder.lshr(u, eight), builder.ashr(s, eight))
        return builder.add(total, builder.add(even, odd))

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


def _panel_columns(
    builder: Builder, isa: Isa, panels: int, first: Value, panel_bytes: Value, lane_bytes: int = 4
) -> list[Value]:
    """Pointers to the first word of each vector of columns, panel after panel."""
    return [
        pointer(
            builder, builder.add(first, builder.add(builder.mul(panel_bytes, I64(panel)), I64(column * lane_bytes)))
        )
        for panel in range(panels)
        for column in range(0, isa.panel_columns, isa.lanes)
    ]


def _block(builder: Builder, base: Value, table: Value, index: Value, block_bytes: Value) -> Value:
    """Where block table[index] starts."""
    entry = at(builder, pointer(builder, table), builder.mul(index, I64(4)))
    number = builder.sext(builder.load(entry, typ=I32, align=4), I64)
    return pointer(builder, builder.add(base, builder.mul(number, block_bytes)))
