"""Causal attention over paged keys and values, one tile of queries at a time.

A tile is some queries of one sequence that share a key-value head: scores against all keys they may see, softmax,
weighted sum of values. Scores are kept whole, so a query's result does not depend on which others are in its tile.
"""

from typing import Any

from numba import float32, njit

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import floats, store_float32
from services.worker.engine.kernels.compiled.rows import Floats, exp, largest, norm, rotate
from services.worker.engine.kernels.compiled.tiles import BFLOAT16, FLOAT32, query_keys, weigh_values

MAX_BLOCKS = 4  # whose scores one tile computes at once


@njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _exponentiate(values: Floats, subtrahend: float) -> float:
    """values = exp(values - subtrahend), in place; their sum."""
    total = float32(0.0)
    for i in range(len(values)):
        values[i] = exp(values[i] - subtrahend)
        total += values[i]
    return total


def make_attend(
    isa: Isa, rows: int, *, group: int, head_dim: int, block_size: int, kv_bits: int, qk_norm: bool, eps: float
) -> Any:
    """`attend(...)` for tiles of `rows` queries; query i is head i % group of the sequence's token i // group.

    Arguments: the first query of the tile, of how many; the first token's position; window; addresses of that token's
    queries of this KV head in the qkv product, of its bytes per token, of the query norm's weight, of cosines and sines
    [tokens][head_dim / 2]; of the sequence's block table, of the head's keys and values in block 0; bytes per block;
    addresses of scratch memory and its tokens. The outputs, [rows][head_dim], are left at its start.
    """
    format_ = BFLOAT16 if kv_bits == 16 else FLOAT32
    per_block = block_size // isa.lanes
    blocks = next(n for n in (MAX_BLOCKS, 2, 1) if rows * n * per_block <= isa.accumulators or n == 1)
    columns = head_dim // isa.lanes
    vectors = next(n for n in (4, 2, 1) if columns % n == 0 and (rows * n <= isa.accumulators or n == 1))
    score = query_keys(isa, rows, blocks, head_dim, block_size, format_)
    weigh = weigh_values(isa, rows, vectors, head_dim, block_size, format_)
    value_step, out_step = vectors * isa.lanes * (kv_bits // 8), vectors * isa.lanes * 4
    chunks = columns // vectors
    scale = float32(head_dim**-0.5)
    half = head_dim // 2

    def attend(
        first: int, queries: int, start: int, window: int, qkv: int, token_bytes: int, q_norm: int, cos: int, sin: int,
        table: int, keys: int, values: int, block_bytes: int, scratch: int, scratch_tokens: int,
    ) -> None:  # fmt: skip
        packed = scratch + 4 * rows * head_dim
        scores = packed + 4 * rows * head_dim
        weights = scores + 4 * rows * scratch_tokens
        for row in range(rows):
            token, head = min(first + row, queries - 1) // group, min(first + row, queries - 1) % group
            out = floats(scratch, head_dim)  # as room for one query
            out[:] = floats(qkv + token * token_bytes + head * head_dim * 4, head_dim)
            if qk_norm:
                norm(out, floats(q_norm, head_dim), eps)
            rotate(out, floats(cos + token * half * 4, half), floats(sin + token * half * 4, half))
            for i in range(head_dim):
                store_float32(packed + 4 * (i * rows + row), out[i] * scale)
        last = start + min(first + rows, queries) // group - (1 if min(first + rows, queries) % group == 0 else 0)
        first_block = max(0, start + first // group - window + 1) // block_size
        num_blocks = last // block_size + 1 - first_block
        blocks_at = table + 4 * first_block
        for block in range(0, num_blocks, blocks):
            to = scores + 4 * block * block_size
            score(packed, keys, blocks_at + 4 * block, num_blocks - block, block_bytes, to, 4 * scratch_tokens)
        tokens = last + 1 - first_block * block_size
        for row in range(rows):
            position = start + min(first + row, queries - 1) // group - first_block * block_size
            low = max(0, position - window + 1)
            _softmax(floats(scores + 4 * row * scratch_tokens, tokens), low, position + 1, row, rows, weights)
        for chunk in range(chunks):
            weigh(
                weights,
                values + chunk * value_step,
                blocks_at,
                block_bytes,
                tokens,
                scratch + chunk * out_step,
                4 * head_dim,
            )

    return attend


@njit(nogil=True, error_model="numpy")
def _softmax(scores: Floats, low: int, high: int, row: int, rows: int, weights: int) -> None:
    """Writes the softmax of scores[low:high], and zeros elsewhere, as column `row` of weights [len(scores)][rows]."""
    to = weights + 4 * row
    seen = scores[low:high]
    inverse = float32(1.0) / _exponentiate(seen, largest(seen.ctypes.data, len(seen)))
    for i in range(low):
        store_float32(to + 4 * i * rows, float32(0.0))
    for i in range(low, high):
        store_float32(to + 4 * i * rows, scores[i] * inverse)
    for i in range(high, len(scores)):
        store_float32(to + 4 * i * rows, float32(0.0))
