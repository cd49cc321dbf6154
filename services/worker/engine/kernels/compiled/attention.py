"""Causal attention over paged keys and values, one tile of queries at a time.

A tile is some queries of one sequence that share a key-value head. It goes through the context in chunks of keys that
begin at multiples of a fixed number of tokens: scores, exponentials, weighted sum of values, all in near caches (Dao et
al. 2022, FlashAttention). As chunks do not depend on the tile, neither does a query's result.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
from numba import float32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.activations import put_floats, put_pairs
from services.worker.engine.kernels.compiled.attention_products import (
    by_matrices,
    chunk_tokens,
    make_matrix_products,
    make_vector_products,
    panels_bytes,
    score_columns,
    tile_queries,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import floats, store_float32
from services.worker.engine.kernels.compiled.matrix_tiles import TILE_DEPTH
from services.worker.engine.kernels.compiled.rows import Floats, copy, exp, norm, rotate
from services.worker.engine.kernels.compiled.vectors import (
    BF16,
    F32,
    I64,
    LOG2_E,
    Builder,
    Value,
    at,
    constant,
    larger,
    largest_lane,
    load,
    pointer,
    power_of_two,
    short_power_of_two,
    splat,
    sum_of_lanes,
    vector,
)

_CHUNKS_LAID = 4  # that are kept for the tiles to come, which often have the same keys before them
_RUN = 4  # vectors of scores that are compared at once
_LN2 = float32(np.log(2.0))
_UNSEEN = float32(-np.inf)


def attention_scratch_bytes(isa: Isa, rows: int, kv_bits: int, head_dim: int, block_size: int) -> int:
    """What a tile of `rows` queries needs: outputs, queries, a row's largest score and sum; scores."""
    rows, at_once = tile_queries(isa, rows, kv_bits, head_dim)
    return 4 * rows * (2 * head_dim + 2) + 4 * at_once * score_columns(block_size)


def laid_bytes(isa: Isa, kv_bits: int, head_dim: int, block_size: int) -> int:
    """What a thread needs for the chunks that it has laid out, whatever the tiles: a multiple of 64."""
    return _CHUNKS_LAID * panels_bytes(head_dim, block_size) if by_matrices(isa, kv_bits, head_dim) else 0


def make_attend(
    isa: Isa, rows: int, *, group: int, head_dim: int, block_size: int, kv_bits: int, qk_norm: bool, eps: float
) -> Any:
    """`attend(...)` for tiles of `rows` queries; query i is head i % group of the sequence's token i // group.

    Arguments: the phase's number; the first query of the tile, of how many; the first token's position; window;
    addresses of that token's queries of this KV head in the qkv product, of its bytes per token, of the query norm's
    weight, of cosines and sines [tokens][head_dim / 2]; of the sequence's block table, of the head's keys and values in
    block 0; bytes per block; addresses of `laid_bytes` that are the thread's own, and of scratch memory. The outputs,
    [rows][head_dim], are left at its start.
    """
    pairs = isa.activation_bits(kv_bits) == 16
    matrices, columns = by_matrices(isa, kv_bits, head_dim), score_columns(block_size)
    grain = TILE_DEPTH if matrices else isa.lanes  # tokens whose values are weighed at once
    aligned_blocks = grain // math.gcd(grain, block_size)  # what is weighed at once begins at multiples of so many
    rows, at_once = tile_queries(isa, rows, kv_bits, head_dim)
    make_products = make_matrix_products if matrices else make_vector_products
    lay, score, weigh = make_products(isa, rows, head_dim=head_dim, block_size=block_size, kv_bits=kv_bits)
    put_query = _make_put_query(head_dim, pairs, qk_norm, eps)
    power = short_power_of_two if matrices else power_of_two
    find_largest, exponentials = _make_find_largest(isa), _exponentials(isa, pairs, power)
    panel_bytes = panels_bytes(head_dim, block_size)
    query_bytes, chunk_blocks = (2 if pairs else 4) * head_dim, chunk_tokens(block_size) // block_size

    def attend(
        phase: int, first: int, queries: int, start: int, window: int, qkv: int, token_bytes: int, q_norm: int,
        cos: int, sin: int, table: int, keys: int, values: int, block_bytes: int, laid: int, scratch: int,
    ) -> None:  # fmt: skip
        packed = scratch + 4 * rows * head_dim
        largest, sums = floats(packed + 4 * rows * head_dim, rows), floats(packed + 4 * rows * (head_dim + 1), rows)
        scores = packed + 4 * rows * (head_dim + 2)
        count = min(rows, queries - first)
        for row in range(count):
            token, head = (first + row) // group, (first + row) % group
            query = qkv + token * token_bytes + head * head_dim * 4
            put_query(query, token, q_norm, cos, sin, floats(scratch, head_dim), packed + row * query_bytes)
        floats(scratch, count * head_dim)[:] = float32(0.0)
        largest[:] = _UNSEEN
        sums[:] = float32(0.0)
        end = start + (first + count - 1) // group + 1
        block = max(0, start + first // group - window + 1) // block_size // aligned_blocks * aligned_blocks
        end_block = (end + block_size - 1) // block_size
        while block < end_block:
            end_of_chunk = min((block // chunk_blocks + 1) * chunk_blocks, end_block)
            before, blocks_at = block * block_size, table + 4 * block
            panels = laid + block // chunk_blocks % _CHUNKS_LAID * panel_bytes
            width = (end_of_chunk - block) * block_size
            lay(phase, keys, values, blocks_at, block_bytes, min(end - before, width), panels)
            for top in range(0, count, at_once):
                some = min(at_once, count - top)
                tokens = min(start + (first + top + some - 1) // group + 1 - before, width)
                if tokens <= 0:
                    continue
                score(some, packed + top * query_bytes, keys, blocks_at, tokens, block_bytes, scores, panels)
                padded = (tokens + grain - 1) // grain * grain
                for row in range(top, top + some):
                    position = start + (first + row) // group - before
                    low, high = max(0, position - window + 1), min(position + 1, tokens)
                    row_scores, out = scores + 4 * (row - top) * columns, floats(scratch + 4 * row * head_dim, head_dim)
                    find_largest(row_scores, padded, low, high, largest, sums, row, out)
                    less = largest[row] if largest[row] > _UNSEEN else float32(0.0)  # its window may begin beyond
                    sums[row] += exponentials(row_scores, padded, less)
                weigh(some, scores, values, blocks_at, block_bytes, tokens, scratch + 4 * top * head_dim, panels)
            block = end_of_chunk
        for row in range(count):
            _scale(floats(scratch + 4 * row * head_dim, head_dim), float32(1.0) / sums[row])

    return attend


def _make_put_query(head_dim: int, pairs: bool, qk_norm: bool, eps: float) -> Any:
    half, scale = head_dim // 2, float32(head_dim**-0.5 * LOG2_E)  # which makes scores exponents of 2
    put = put_pairs if pairs else put_floats

    @njit(nogil=True, error_model="numpy")
    def put_query(query: int, token: int, q_norm: int, cos: int, sin: int, temp: Floats, to: int) -> None:
        """Stores the query of a token as tiles read it: normed, rotated and scaled."""
        if qk_norm:
            norm(floats(query, head_dim), floats(q_norm, head_dim), eps, temp)
        else:
            copy(floats(query, head_dim), temp)
        rotate(temp, floats(cos + token * half * 4, half), floats(sin + token * half * 4, half))
        _scale(temp, scale)
        put(temp.ctypes.data, head_dim, 0, 0, 1, head_dim, to, 0, 0)

    return put_query


def _make_find_largest(isa: Isa) -> Any:
    run, largest_of = _RUN * isa.lanes, _largest(isa)

    @njit(nogil=True, error_model="numpy")
    def find_largest(
        scores: int, width: int, low: int, high: int, largest: Floats, sums: Floats, row: int, out: Floats
    ) -> None:
        """Updates a row's largest score by scores[low:high] of a chunk, and hides the others.

        What is there already, sum and output, is scaled to the new one.
        """
        width = (width + run - 1) // run * run
        for i in range(min(low, width)):
            store_float32(scores + 4 * i, _UNSEEN)
        for i in range(max(high, 0), width):
            store_float32(scores + 4 * i, _UNSEEN)
        highest = largest_of(scores, width)
        if highest > largest[row]:
            factor = exp((largest[row] - highest) * _LN2)
            _scale(out, factor)
            sums[row] *= factor
            largest[row] = highest

    return find_largest


@njit(nogil=True, error_model="numpy")
def _scale(values: Floats, factor: float) -> None:
    for i in range(len(values)):
        values[i] *= factor


def _largest(isa: Isa) -> Any:
    """Intrinsic (values, count): the largest of `count` float32, a positive multiple of _RUN vectors."""
    lanes = isa.lanes

    @intrinsic
    def largest(_: Any, values: Any, count: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            values, count = arguments
            least = constant(F32, lanes, -math.inf)
            found = [cgutils.alloca_once_value(builder, least) for _ in range(_RUN)]
            with cgutils.for_range(builder, builder.udiv(count, I64(_RUN * lanes)), intp=I64) as loop:
                run = at(builder, pointer(builder, values), builder.mul(loop.index, I64(4 * _RUN * lanes)))
                for index, each in enumerate(found):
                    x = load(builder, at(builder, run, I64(4 * lanes * index)), F32, lanes)
                    builder.store(larger(builder, x, builder.load(each)), each)
            return largest_lane(builder, reduce(partial(larger, builder), [builder.load(each) for each in found]))

        return types.float32(types.int64, types.int64), generate

    return largest


def _exponentials(isa: Isa, pairs: bool, power: Callable[[Builder, Value], Value]) -> Any:
    """Intrinsic (values, count, subtrahend): 2 ** (value - subtrahend) of `count` float32 in place, and their sum.

    `count` is a multiple of `lanes`. `pairs`: as bfloat16, from the same start. `power`: how powers are computed.
    """
    lanes = isa.lanes

    @intrinsic
    def exponentials(_: Any, values: Any, count: Any, subtrahend: Any) -> Any:
        def generate(_: Any, builder: Builder, __: Any, arguments: Any) -> Value:
            values, count, subtrahend = arguments
            first, less = pointer(builder, values), splat(builder, subtrahend, lanes)
            total = cgutils.alloca_once_value(builder, constant(F32, lanes, 0.0))
            with cgutils.for_range(builder, builder.udiv(count, I64(lanes)), intp=I64) as loop:
                x = load(builder, at(builder, first, builder.mul(loop.index, I64(4 * lanes))), F32, lanes)
                powers = power(builder, builder.fsub(x, less))
                builder.store(builder.fadd(builder.load(total), powers), total)
                stored = builder.fptrunc(powers, vector(BF16, lanes)) if pairs else powers
                to = at(builder, first, builder.mul(loop.index, I64((2 if pairs else 4) * lanes)))
                builder.store(stored, to, align=2)
            return sum_of_lanes(builder, builder.load(total))

        return types.float32(types.int64, types.int64, types.float32), generate

    return exponentials
