"""Causal attention over paged keys and values, one tile of queries at a time.

A tile is some queries of one sequence that share a key-value head. It goes through the context in chunks of keys that
begin at multiples of a fixed number of tokens: scores, exponentials, weighted sum of values, all in the nearest cache
(Dao et al. 2022, FlashAttention). As chunks do not depend on the tile, neither does a query's result.
"""

import math
from functools import partial, reduce
from typing import Any

import numpy as np
from numba import float32, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.attention_tiles import (
    BFLOAT16_ROW_DOTS,
    BFLOAT16_ROWS,
    query_keys,
    weigh_values,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import floats, store_float32
from services.worker.engine.kernels.compiled.rows import Floats, exp, norm, put_floats, put_pairs, rotate
from services.worker.engine.kernels.compiled.tiles import FLOAT32
from services.worker.engine.kernels.compiled.vectors import (
    BF16,
    F32,
    I64,
    Builder,
    Value,
    at,
    constant,
    larger,
    largest_lane,
    load,
    pointer,
    power_of_two,
    splat,
    sum_of_lanes,
    vector,
)

_CHUNK_TOKENS = 512  # about so many
_MAX_BLOCKS = 4  # whose scores one tile computes at once
_RUN = 4  # vectors of scores that are compared at once
_LOG2_E = np.log2(np.e)
_LN2 = float32(np.log(2.0))
_UNSEEN = float32(-np.inf)


def chunk_tokens(block_size: int) -> int:
    """Tokens of a chunk: whole runs of blocks."""
    run = _MAX_BLOCKS * block_size
    return max(run, _CHUNK_TOKENS // run * run)


def attention_scratch_bytes(rows: int, head_dim: int, block_size: int) -> int:
    """What a tile of `rows` queries needs: outputs, queries, scores; a row's largest score and sum."""
    return 4 * rows * (2 * head_dim + chunk_tokens(block_size) + 2)


def make_attend(
    isa: Isa, rows: int, *, group: int, head_dim: int, block_size: int, kv_bits: int, qk_norm: bool, eps: float
) -> Any:
    """`attend(...)` for tiles of `rows` queries; query i is head i % group of the sequence's token i // group.

    Arguments: the first query of the tile, of how many; the first token's position; window; addresses of that token's
    queries of this KV head in the qkv product, of its bytes per token, of the query norm's weight, of cosines and sines
    [tokens][head_dim / 2]; of the sequence's block table, of the head's keys and values in block 0; bytes per block;
    address of scratch memory. The outputs, [rows][head_dim], are left at its start.
    """
    pairs = isa.activation_bits(kv_bits) == 16
    format_ = FLOAT32 if kv_bits == 32 else BFLOAT16_ROW_DOTS if pairs else BFLOAT16_ROWS
    per_block = block_size // isa.lanes
    blocks = next(n for n in (_MAX_BLOCKS, 2, 1) if rows * n * per_block <= isa.accumulators or n == 1)
    columns = head_dim // isa.lanes
    vectors = next(n for n in (4, 2, 1) if columns % n == 0 and (rows * n <= isa.accumulators or n == 1))
    room = chunk_tokens(block_size)
    chunk_blocks = room // block_size
    sizes: Any = {"head_dim": head_dim, "block_size": block_size}
    score = query_keys(isa, rows, blocks, **sizes, out_tokens=room, keys=format_)
    weigh = weigh_values(isa, rows, vectors, **sizes, weight_tokens=room, values=format_)
    put_query = _make_put_query(head_dim, pairs, qk_norm, eps)
    find_largest, exponentials = _make_find_largest(isa), _exponentials(isa, pairs)
    value_step, out_step = vectors * isa.lanes * (kv_bits // 8), vectors * isa.lanes * 4
    parts, query_bytes = columns // vectors, (2 if pairs else 4) * head_dim

    def attend(
        first: int, queries: int, start: int, window: int, qkv: int, token_bytes: int, q_norm: int, cos: int, sin: int,
        table: int, keys: int, values: int, block_bytes: int, scratch: int,
    ) -> None:  # fmt: skip
        packed = scratch + 4 * rows * head_dim
        scores = packed + 4 * rows * head_dim
        largest, sums = floats(scores + 4 * rows * room, rows), floats(scores + 4 * rows * (room + 1), rows)
        for row in range(rows):
            token, head = min(first + row, queries - 1) // group, min(first + row, queries - 1) % group
            query = qkv + token * token_bytes + head * head_dim * 4
            put_query(query, token, q_norm, cos, sin, floats(scratch, head_dim), packed + row * query_bytes)
        floats(scratch, rows * head_dim)[:] = float32(0.0)
        largest[:] = _UNSEEN
        sums[:] = float32(0.0)
        end = start + (min(first + rows, queries) - 1) // group + 1
        block = max(0, start + first // group - window + 1) // block_size
        end_block = (end + block_size - 1) // block_size
        while block < end_block:
            end_of_chunk = min((block // chunk_blocks + 1) * chunk_blocks, end_block)
            before, blocks_at = block * block_size, table + 4 * block
            for done in range(0, end_of_chunk - block, blocks):
                to = scores + 4 * done * block_size
                score(packed, keys, blocks_at + 4 * done, end_block - block - done, block_bytes, to)
            width = (end_of_chunk - block) * block_size
            for row in range(rows):
                position = start + min(first + row, queries - 1) // group - before
                low, high = max(0, position - window + 1), min(position + 1, width)
                row_scores, out = scores + 4 * row * room, floats(scratch + 4 * row * head_dim, head_dim)
                find_largest(row_scores, width, low, high, largest, sums, row, out)
                less = largest[row] if largest[row] > _UNSEEN else float32(0.0)  # its window may begin beyond
                sums[row] += exponentials(row_scores, width, less)
            tokens = min(end - before, width)
            for part in range(parts):
                to = scratch + part * out_step
                weigh(scores, values + part * value_step, blocks_at, block_bytes, tokens, to)
            block = end_of_chunk
        for row in range(rows):
            _scale(floats(scratch + 4 * row * head_dim, head_dim), float32(1.0) / sums[row])

    return attend


def _make_put_query(head_dim: int, pairs: bool, qk_norm: bool, eps: float) -> Any:
    half, scale = head_dim // 2, float32(head_dim**-0.5 * _LOG2_E)  # which makes scores exponents of 2
    put = put_pairs if pairs else put_floats

    @njit(nogil=True, error_model="numpy")
    def put_query(query: int, token: int, q_norm: int, cos: int, sin: int, temp: Floats, to: int) -> None:
        """Stores the query of a token as tiles read it: normed, rotated and scaled."""
        if qk_norm:
            norm(floats(query, head_dim), floats(q_norm, head_dim), eps, temp)
        else:
            temp[:] = floats(query, head_dim)
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


def _exponentials(isa: Isa, pairs: bool) -> Any:
    """Intrinsic (values, count, subtrahend): 2 ** (value - subtrahend) of `count` float32 in place, and their sum.

    `count` is a multiple of `lanes`. `pairs`: as bfloat16, from the same start.
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
                powers = power_of_two(builder, builder.fsub(x, less))
                builder.store(builder.fadd(builder.load(total), powers), total)
                stored = builder.fptrunc(powers, vector(BF16, lanes)) if pairs else powers
                to = at(builder, first, builder.mul(loop.index, I64((2 if pairs else 4) * lanes)))
                builder.store(stored, to, align=2)
            return sum_of_lanes(builder, builder.load(total))

        return types.float32(types.int64, types.int64, types.float32), generate

    return exponentials
