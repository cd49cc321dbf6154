"""The two products of attention, of a tile's queries with a chunk of the context: by vectors, or by matrices.

Both are made for tiles with room for `rows` queries (see `tile_queries`):
`lay(phase, keys, values, table, block_bytes, tokens, panels)` prepares a chunk of so many tokens, unless that was the
last it did with these panels in this phase;
`score(count, queries, keys, table, tokens, block_bytes, scores, panels)` writes the scores of its first `tokens` keys,
[queries][score_columns], of the first `count` of the queries that are taken at once, and something for the others;
`weigh(count, weights, values, table, block_bytes, tokens, out, panels)` adds their weighted values to out,
[queries][head_dim]; the weights lie where the scores were.
`keys` and `values` are the addresses of a head's in block 0, `table` that of the chunk's first block number. `panels`
is the thread's own memory, which keeps what was laid out there until the phase ends.
"""

from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.attention_tiles import (
    BFLOAT16_ROW_DOTS,
    BFLOAT16_ROWS,
    query_keys,
    weigh_values,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import fetching, halves, load_int32, longs, store_int32
from services.worker.engine.kernels.compiled.matrix_tiles import (
    PANEL_COLUMNS,
    TILE_DEPTH,
    TILE_ROWS,
    begin_tiles,
    end_tiles,
    pair_rows,
    tile_products,
)
from services.worker.engine.kernels.compiled.tiles import FLOAT32

_CHUNK_TOKENS = 512  # about so many
_BLOCKS_AHEAD = 2  # how far before its use a block's keys are asked for
_NAME = 3  # int64s that name what panels hold, before the chunk's block numbers: phase, keys, tokens
_MAX_BLOCKS = 4  # whose scores one tile of vectors computes at once
_LINE = 4 * PANEL_COLUMNS  # bytes of a panel's row


def chunk_tokens(block_size: int) -> int:
    """Tokens of a chunk: whole runs of blocks."""
    run = _MAX_BLOCKS * block_size
    return max(run, _CHUNK_TOKENS // run * run)


def score_columns(block_size: int) -> int:
    """Scores from one query's to the next's: a cache line more than are used, so that not all begin in the same set."""
    return chunk_tokens(block_size) + 16


def panels_bytes(head_dim: int, block_size: int) -> int:
    """Of a chunk's keys, its values, a row of zeros, and what chunk it is."""
    size = 2 * head_dim * (2 * chunk_tokens(block_size) + 1) + 8 * _NAME + 4 * chunk_tokens(block_size) // block_size
    return -(-size // 64) * 64


def by_matrices(isa: Isa, kv_bits: int, head_dim: int) -> bool:
    return isa.uses_matrices(kv_bits) and head_dim % TILE_DEPTH == 0


def tile_queries(isa: Isa, rows: int, kv_bits: int, head_dim: int) -> tuple[int, int]:
    """How many queries a tile for `rows` of them has room for, and how many of these it takes at once."""
    if not by_matrices(isa, kv_bits, head_dim):
        return rows, rows
    pair = 2 * TILE_ROWS
    return (rows, rows) if rows <= TILE_ROWS else (-(-rows // pair) * pair, pair)


def make_vector_products(isa: Isa, rows: int, *, head_dim: int, block_size: int, kv_bits: int) -> Any:
    pairs = isa.activation_bits(kv_bits) == 16
    format_ = FLOAT32 if kv_bits == 32 else BFLOAT16_ROW_DOTS if pairs else BFLOAT16_ROWS
    per_block = block_size // isa.lanes
    at_once = next(n for n in (_MAX_BLOCKS, 2, 1) if rows * n * per_block <= isa.accumulators or n == 1)
    columns = head_dim // isa.lanes
    vectors = next(n for n in (4, 2, 1) if columns % n == 0 and (rows * n <= isa.accumulators or n == 1))
    sizes: Any = {"head_dim": head_dim, "block_size": block_size}
    width = score_columns(block_size)
    score_blocks = query_keys(isa, rows, at_once, **sizes, out_tokens=width, keys=format_)
    weigh_columns = weigh_values(isa, rows, vectors, **sizes, weight_tokens=width, values=format_)
    value_step, out_step = vectors * isa.lanes * (kv_bits // 8), vectors * isa.lanes * 4
    parts = columns // vectors

    @njit(nogil=True, error_model="numpy")
    def lay(_: int, __: int, ___: int, ____: int, _____: int, ______: int, _______: int) -> None:
        return

    @njit(nogil=True, error_model="numpy")
    def score(_: int, queries: int, keys: int, table: int, tokens: int, block_bytes: int, scores: int, __: int) -> None:
        blocks = (tokens + block_size - 1) // block_size
        for done in range(0, blocks, at_once):
            score_blocks(queries, keys, table + 4 * done, blocks - done, block_bytes, scores + 4 * done * block_size)

    @njit(nogil=True, error_model="numpy")
    def weigh(_: int, weights: int, values: int, table: int, block_bytes: int, tokens: int, out: int, __: int) -> None:
        for part in range(parts):
            weigh_columns(weights, values + part * value_step, table, block_bytes, tokens, out + part * out_step)

    return lay, score, weigh


def make_matrix_products(_: Isa, rows: int, *, head_dim: int, block_size: int, kv_bits: int) -> Any:
    """Keys and values of bfloat16 are laid out as panels, which is why a tile should have many queries.

    A chunk has to begin at a multiple of TILE_DEPTH tokens, since so many are summed at once.
    """
    assert kv_bits == 16
    height = min(rows, TILE_ROWS)  # of a register
    width = 4 * score_columns(block_size)
    score_panel, weigh_panel = _make_product(adding=False), _make_product(adding=True)
    key_panel_bytes, value_panel_bytes, of_chunk = _panel_sizes(head_dim, block_size)
    query_bytes, out_bytes = 2 * head_dim, 4 * head_dim

    @njit(nogil=True, error_model="numpy")
    def score(count: int, queries: int, _: int, __: int, tokens: int, ___: int, scores: int, panels: int) -> None:
        begin_tiles(height)
        for panel in range((tokens + PANEL_COLUMNS - 1) // PANEL_COLUMNS):
            score_panel(
                count > height, queries, query_bytes, 2 * TILE_DEPTH, height * query_bytes,
                panels + panel * key_panel_bytes, head_dim // TILE_DEPTH, scores + panel * _LINE, width,
                height * width, 0,
            )  # fmt: skip
        end_tiles()

    @njit(nogil=True, error_model="numpy")
    def weigh(count: int, weights: int, _: int, __: int, ___: int, tokens: int, out: int, panels: int) -> None:
        begin_tiles(height)
        for panel in range(head_dim // PANEL_COLUMNS):
            weigh_panel(
                count > height, weights, width, 2 * TILE_DEPTH, height * width,
                panels + of_chunk + panel * value_panel_bytes, (tokens + TILE_DEPTH - 1) // TILE_DEPTH,
                out + panel * _LINE, out_bytes, height * out_bytes, 0,
            )  # fmt: skip
        end_tiles()

    return _make_lay(head_dim, block_size), score, weigh


def _panel_sizes(head_dim: int, block_size: int) -> tuple[int, int, int]:
    """Bytes of a panel of keys, of one of values, and of a chunk's keys, or values, in panels."""
    tokens = chunk_tokens(block_size)
    return head_dim // 2 * _LINE, tokens // 2 * _LINE, 2 * head_dim * tokens


def _make_product(*, adding: bool) -> Any:
    single, pair = tile_products(1, adding=adding), tile_products(2, adding=adding)

    @njit(nogil=True, error_model="numpy")
    def product(both: bool, *arguments: int) -> None:
        """`tile_products` of one tile of rows, or of two."""
        if both:
            pair(*arguments)
        else:
            single(*arguments)

    return product


def _make_lay(head_dim: int, block_size: int) -> Any:
    key_panel_bytes, value_panel_bytes, of_chunk = _panel_sizes(head_dim, block_size)
    fetch = fetching(2 * head_dim * block_size)

    @njit(nogil=True, error_model="numpy")
    def lay(phase: int, keys: int, values: int, table: int, block_bytes: int, tokens: int, panels: int) -> None:
        """Keys as [tokens / PANEL_COLUMNS][head_dim / 2][PANEL_COLUMNS] words of two k, and values as
        [head_dim / PANEL_COLUMNS][tokens / 2][PANEL_COLUMNS] words of two tokens, zeros after the last.
        """
        last = (tokens - 1) // block_size
        if not _takes_name(panels + 2 * of_chunk + 2 * head_dim, phase, keys, tokens, table, last + 1):
            return
        for token in range(0, tokens, TILE_ROWS):
            at = load_int32(table + 4 * (token // block_size)) * block_bytes
            if token % block_size == 0:  # no processor foresees where the next block is
                fetch(values + at)
                fetch(keys + load_int32(table + 4 * min(token // block_size + _BLOCKS_AHEAD, last)) * block_bytes)
            block = keys + at
            source = block + 2 * (token % block_size)
            to = panels + token // PANEL_COLUMNS * key_panel_bytes + 4 * (token % PANEL_COLUMNS)
            for k in range(0, head_dim, 2):
                row = source + 2 * k * block_size
                pair_rows(row, row + 2 * block_size, to + k // 2 * _LINE)
        zeros = panels + 2 * of_chunk
        halves(zeros, head_dim)[:] = 0
        for token in range(0, (tokens + TILE_DEPTH - 1) // TILE_DEPTH * TILE_DEPTH, 2):
            first = second = zeros
            if token < tokens:
                block = values + load_int32(table + 4 * (token // block_size)) * block_bytes
                first = block + 2 * (token % block_size) * head_dim
            if token + 1 < tokens:
                second = first + 2 * head_dim
            to = panels + of_chunk + token // 2 * _LINE
            for k in range(0, head_dim, TILE_ROWS):
                line = to + k // PANEL_COLUMNS * value_panel_bytes + 4 * (k % PANEL_COLUMNS)
                pair_rows(first + 2 * k, second + 2 * k, line)

    return lay


@njit(nogil=True, error_model="numpy")
def _takes_name(name: int, phase: int, keys: int, tokens: int, table: int, blocks: int) -> bool:
    """Names what panels are to hold from now on; False if they hold it already."""
    facts, numbers = longs(name, _NAME), name + 8 * _NAME
    same = facts[0] == phase and facts[1] == keys and facts[2] == tokens
    facts[0], facts[1], facts[2] = phase, keys, tokens
    for block in range(blocks):
        number = load_int32(table + 4 * block)
        same = same and load_int32(numbers + 4 * block) == number
        store_int32(numbers + 4 * block, number)
    return not same
