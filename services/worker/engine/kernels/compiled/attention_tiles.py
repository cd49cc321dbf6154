"""The tiles of attention: scores of keys, and sums of values, out of blocks of KV.

Activations lie row after row, keys and values as plain rows of each k: a key's elements or a token's values.
"""

from dataclasses import replace
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.tiles import Tile, WeightFormat
from services.worker.engine.kernels.compiled.vectors import (
    F32,
    I16,
    I32,
    I64,
    Builder,
    Value,
    add_pair_products,
    at,
    constant,
    interleave,
    load,
    pointer,
    vector,
)


def _decode_bfloat16(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    halves = builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))
    return [builder.bitcast(builder.shl(halves, constant(I32, lanes, 16)), vector(F32, lanes))]


def _pair_rows(builder: Builder, where: Value, lanes: int, row_bytes: int) -> list[Value]:
    """Words of two bfloat16, one of each of two rows."""
    first, second = load(builder, where, I16, lanes), load(builder, at(builder, where, I64(row_bytes)), I16, lanes)
    return [builder.bitcast(interleave(builder, first, second), vector(I32, lanes))]


def _pair_with_zero(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    return [builder.zext(load(builder, where, I16, lanes), vector(I32, lanes))]


BFLOAT16_ROWS = WeightFormat(2, 1, _decode_bfloat16)  # keys and values
BFLOAT16_ROW_DOTS = WeightFormat(2, 1, _pair_rows, 2, I32, add_pair_products)  # the same, with activations in pairs
_LAST_ROW = replace(BFLOAT16_ROW_DOTS, decode=_pair_with_zero)  # which has no other to go with


def query_keys(
    isa: Isa, rows: int, blocks: int, *, head_dim: int, block_size: int, out_tokens: int, keys: WeightFormat
) -> Any:
    """Intrinsic (queries, base, table, left, block_bytes, out): the scores of `blocks` blocks of keys.

    queries is [rows][head_dim], in the format's words; a block's keys are [head_dim][block_size] at
    base + table[i] * block_bytes, `table` the address of int32s of which `left` are left: beyond them the last one is
    taken again. out is [rows][blocks * block_size] within rows of `out_tokens`.
    """
    vectors = block_size // isa.lanes
    tile = Tile(isa.lanes, rows, blocks * vectors, keys, 4 // keys.depth * head_dim, 4)

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
    isa: Isa, rows: int, vectors: int, *, head_dim: int, block_size: int, weight_tokens: int, values: WeightFormat
) -> Any:
    """Intrinsic (weights, base, table, block_bytes, tokens, out): out += weights x values.

    weights is [rows][tokens], in the format's words, within rows of `weight_tokens` float32; where they are pairs, one
    more token has weights, which are finite. A block's values are [block_size][head_dim] at
    base + table[i] * block_bytes; `base` points at the first of the `vectors` vectors of columns that are computed. out
    is [rows][vectors * lanes] within rows of `head_dim`. Only `tokens` tokens' values are read.
    """
    tile = Tile(isa.lanes, rows, vectors, values, 4 * weight_tokens, 4)
    depth, row_bytes = values.depth, head_dim * values.element_bytes

    @intrinsic
    def weigh(_: Any, weights: Any, base: Any, table: Any, block_bytes: Any, tokens: Any, out: Any) -> Any:
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            weights, base, table, block_bytes, tokens, out = arguments
            sums = tile.zeros(builder)
            tile.read(builder, sums, pointer(builder, out), I64(4 * head_dim))

            def add_block(tile: Tile, index: Value, token: Value, steps: Value, unroll: int) -> None:
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


def _block(builder: Builder, base: Value, table: Value, index: Value, block_bytes: Value) -> Value:
    """Where block table[index] starts."""
    entry = at(builder, pointer(builder, table), builder.mul(index, I64(4)))
    number = builder.sext(builder.load(entry, typ=I32, align=4), I64)
    return pointer(builder, builder.add(base, builder.mul(number, block_bytes)))
