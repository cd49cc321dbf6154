"""The phases of a step beside its matrix products, each shared out by rows or by tiles of attention.

Activations of a tile's rows lie side by side, in the same cache lines, so one thread writes them all.
"""

from typing import Any

import numpy as np
from numba import njit, uint32

from services.worker.engine.kernels.compiled.activations import make_put, puts_whole_rows
from services.worker.engine.kernels.compiled.attention import laid_bytes
from services.worker.engine.kernels.compiled.attention_products import by_matrices
from services.worker.engine.kernels.compiled.frame import (
    FRAME_FIELDS,
    Frame,
    Kernel,
    Shape,
    place,
    row_scratch_bytes,
    tall_rows,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import call_address, float_of_bits, floats, halves, longs
from services.worker.engine.kernels.compiled.packing import padded_columns
from services.worker.engine.kernels.compiled.rows import add, add_to, bfloat16_bits, copy, norm, rotate, swiglu
from services.worker.engine.kernels.compiled.team import claim, done, help_out, next_item, phase_of
from services.worker.engine.kernels.compiled.tiles import GROUP

SWIGLU_PARTS = 4  # that a tile's columns are shared out by, at most


def make_norm_rows(isa: Isa, shape: Shape) -> Kernel:
    """Adds what the last product left to add, and stores the norm as the next one's activations."""
    begin_row, put = _make_begin_row(shape), make_put(isa, shape.weight_bits, shape.hidden)
    hidden, width, eps = shape.hidden, padded_columns(shape.hidden, isa), shape.eps

    def norm_rows(control: int, members: int, rank: int, at: int, which: int, scratch: int) -> None:
        frame, temp = longs(at, FRAME_FIELDS), floats(scratch, hidden)
        count, rows, product = frame[Frame.ROWS], frame[Frame.TILE_ROWS], 2 * which
        weight = floats(frame[Frame.NORMS] + 4 * which * hidden, hidden)
        before, delta = place(frame, Frame.HIDDEN, product - 2), place(frame, Frame.DELTA, product - 1)
        after, x = place(frame, Frame.HIDDEN, product), place(frame, Frame.X, product)
        scales, sums = place(frame, Frame.X_SCALES, product), place(frame, Frame.X_SUMS, product)
        groups, tiles = frame[Frame.GROUPS], (count + rows - 1) // rows
        tile = next_item(control, members, rank, groups, tiles)
        while tile >= 0:
            for row in range(tile * rows, min((tile + 1) * rows, count)):
                h = floats(after + 4 * row * hidden, hidden)
                if which == 0:
                    begin_row(frame, row, h)
                elif before == after:
                    add_to(h, floats(delta + 4 * row * width, hidden))
                else:
                    add(floats(before + 4 * row * hidden, hidden), floats(delta + 4 * row * width, hidden), h)
                norm(h, weight, eps, temp)
                put(scratch, hidden, 0, row, rows, hidden, x, scales, sums)
            done(control, members, rank, tile)
            tile = next_item(control, members, rank, groups, tiles)

    return norm_rows


def make_swiglu_rows(isa: Isa, shape: Shape) -> Kernel:
    put = make_put(isa, shape.weight_bits, shape.intermediate)
    intermediate, width = shape.intermediate, padded_columns(2 * shape.intermediate, isa)
    most = 1 if puts_whole_rows(shape.weight_bits) else SWIGLU_PARTS
    parts = next(n for n in range(most, 0, -1) if intermediate % (n * GROUP) == 0 or n == 1)
    size = intermediate // parts

    def swiglu_rows(control: int, members: int, rank: int, at: int, layer: int, scratch: int) -> None:
        frame, temp = longs(at, FRAME_FIELDS), floats(scratch, size)
        count, rows, product = frame[Frame.ROWS], frame[Frame.TILE_ROWS], 4 * layer + 3
        gates, x = place(frame, Frame.PRODUCT, product - 1), place(frame, Frame.X_GATED, product)
        scales, sums = place(frame, Frame.X_SCALES, product), place(frame, Frame.X_SUMS, product)
        groups, tiles = frame[Frame.GROUPS], (count + rows - 1) // rows
        # All parts of a tile are in one group of items.
        items = (tiles + groups - 1) // groups * parts * groups
        item = next_item(control, members, rank, groups, items)
        while item >= 0:
            tile, k = item // groups // parts * groups + item % groups, item // groups % parts * size
            for row in range(tile * rows, min((tile + 1) * rows, count)):
                gate = gates + 4 * (row * width + k)
                swiglu(floats(gate, size), floats(gate + 4 * intermediate, size), temp)
                put(scratch, size, k, row, rows, intermediate, x, scales, sums)
            done(control, members, rank, item)
            item = next_item(control, members, rank, groups, items)

    return swiglu_rows


def make_norm_sampled(isa: Isa, shape: Shape) -> Kernel:
    """The last norm, of the rows that sample alone."""
    put = make_put(isa, shape.head_bits, shape.hidden)
    hidden, width, eps, last = shape.hidden, padded_columns(shape.hidden, isa), shape.eps, 2 * shape.layers

    def norm_sampled(control: int, members: int, rank: int, at: int, which: int, scratch: int) -> None:
        frame, temp = longs(at, FRAME_FIELDS), floats(scratch, hidden)
        weight = floats(frame[Frame.NORMS] + 4 * last * hidden, hidden)
        product, rows, sampled = 2 * last, frame[Frame.SAMPLED_TILE_ROWS], frame[Frame.SAMPLED]
        before, delta = place(frame, Frame.HIDDEN, product - 2), place(frame, Frame.DELTA, product - 1)
        x = place(frame, Frame.X, product)
        scales, sums = place(frame, Frame.X_SCALES, product), place(frame, Frame.X_SUMS, product)
        index = next_item(control, members, rank, 1, sampled)
        while index >= 0:
            row = longs(frame[Frame.SAMPLED_ROWS], sampled)[index]
            add(floats(before + 4 * row * hidden, hidden), floats(delta + 4 * row * width, hidden), temp)
            norm(temp, weight, eps, temp)
            put(scratch, hidden, 0, index, rows, hidden, x, scales, sums)
            done(control, members, rank, index)
            index = next_item(control, members, rank, 1, sampled)

    return norm_sampled


def _make_begin_row(shape: Shape) -> Any:
    """The embedding of a row's token as its hidden state."""
    hidden, bits = shape.hidden, shape.embedding_bits

    @njit(nogil=True, error_model="numpy")
    def begin_row(frame: Any, row: int, out: Any) -> None:
        token = longs(frame[Frame.TOKENS], frame[Frame.ROWS])[row]
        if bits == 32:
            copy(floats(frame[Frame.EMBEDDING] + 4 * token * hidden, hidden), out)
        else:
            source = halves(frame[Frame.EMBEDDING] + 2 * token * hidden, hidden)
            for i in range(hidden):
                out[i] = float_of_bits(np.int32(uint32(source[i]) << uint32(16)))

    return begin_row


def make_write_kv(isa: Isa, shape: Shape) -> Kernel:
    """Keys, normed and rotated, and values of the step's rows into the pool (layout: `paged_kv`)."""
    head_dim, block_size, kv_heads, heads = shape.head_dim, shape.block_size, shape.kv_heads, shape.heads
    half, qk_norm, eps, wide = head_dim // 2, shape.qk_norm, shape.eps, shape.kv_bits == 32
    per_head, element = head_dim * block_size, shape.kv_bits // 8
    of_layer = 2 * kv_heads * per_head * element
    width = padded_columns(shape.qkv_size, isa)

    @njit(nogil=True, error_model="numpy")
    def store(address: int, values: Any, stride: int) -> None:
        if wide:
            out = floats(address, head_dim * stride)
            for i in range(head_dim):
                out[i * stride] = values[i]
        else:
            narrow = halves(address, head_dim * stride)
            for i in range(head_dim):
                narrow[i * stride] = bfloat16_bits(values[i])

    @njit(nogil=True, error_model="numpy")
    def write_row(frame: Any, layer: int, row: int, key: Any) -> None:
        position = longs(frame[Frame.POSITIONS], frame[Frame.ROWS])[row]
        block = longs(frame[Frame.ROW_BLOCKS], frame[Frame.ROWS])[row]
        slot = position % block_size
        cos = floats(frame[Frame.COS] + 4 * position * half, half)
        sin = floats(frame[Frame.SIN] + 4 * position * half, half)
        pool = frame[Frame.KV] + block * frame[Frame.KV_BLOCK_BYTES] + layer * of_layer
        source = place(frame, Frame.PRODUCT, 4 * layer) + 4 * (row * width + heads * head_dim)
        for head in range(kv_heads):
            product = floats(source + 4 * head * head_dim, head_dim)
            if qk_norm:
                norm(product, floats(frame[Frame.QK_NORMS] + 4 * (2 * layer + 1) * head_dim, head_dim), eps, key)
            else:
                copy(product, key)
            rotate(key, cos, sin)
            store(pool + (head * per_head + slot) * element, key, block_size)
            value = floats(source + 4 * (kv_heads + head) * head_dim, head_dim)
            store(pool + ((kv_heads + head) * per_head + slot * head_dim) * element, value, 1)

    def write_kv(control: int, members: int, rank: int, at: int, layer: int, scratch: int) -> None:
        frame, temp = longs(at, FRAME_FIELDS), floats(scratch, head_dim)
        count, rows, groups = frame[Frame.ROWS], frame[Frame.TILE_ROWS], frame[Frame.GROUPS]
        tiles = (count + rows - 1) // rows
        tile = next_item(control, members, rank, groups, tiles)
        while tile >= 0:
            for row in range(tile * rows, min((tile + 1) * rows, count)):
                write_row(frame, layer, row, temp)
            done(control, members, rank, tile)
            tile = next_item(control, members, rank, groups, tiles)

    return write_kv


def make_attention(isa: Isa, shape: Shape) -> Kernel:
    """Attention of every slice, its outputs stored as the next product's activations, or for `make_put_attended`."""
    attend_items = _make_attend_items(isa, shape)

    def attend(control: int, members: int, rank: int, at: int, layer: int, scratch: int) -> None:
        frame = longs(at, FRAME_FIELDS)
        groups, total = frame[Frame.GROUPS], 0
        for turn in range(groups):
            home = (rank + turn) % groups
            mine = claim(control, rank, home)
            total += attend_items(control, members, rank, frame, layer, scratch, home, mine, 0)[0]
        mine = help_out(control, members, rank, total)
        while mine >= 0:  # in steps of one group
            mine = attend_items(control, members, rank, frame, layer, scratch, 0, mine, total)[1]

    return attend


def _make_attend_items(isa: Isa, shape: Shape) -> Any:
    group, kv_heads = shape.heads // shape.kv_heads, shape.kv_heads
    tall, attend_tile = tall_rows(isa, shape.kv_bits, shape.head_dim), _make_attend_tile(isa, shape)
    row_bytes = row_scratch_bytes(isa, shape)  # at the start of scratch, for the other phases
    # What reads the same keys follows one another where they are laid out; else what reads what lies side by side.
    heads_at_once = 1 if by_matrices(isa, shape.kv_bits, shape.head_dim) else kv_heads

    @njit(nogil=True, error_model="numpy")
    def attend_items(
        control: int, members: int, rank: int, frame: Any, layer: int, scratch: int, home: int, mine: int, total: int
    ) -> Any:
        """Does item number `mine` of the group `home` and what the thread gets then: by claiming or, when all `total`
        of the phase are claimed, by helping. How many the group has, and what was got last.
        """
        item, rows, groups, phase = 0, frame[Frame.TILE_ROWS], frame[Frame.GROUPS], phase_of(control, rank)
        for first_head in range(0, kv_heads, heads_at_once):
            for slice_ in range(frame[Frame.SLICES]):
                first_rows = longs(frame[Frame.FIRST_ROWS] + 8 * slice_, 2)
                queries = (first_rows[1] - first_rows[0]) * group
                tiles = 1 if queries == group else (queries + tall - 1) // tall
                for tile in range(tiles - 1, -1, -1):  # the longest work first
                    if (first_rows[0] + tile * tall // group) // rows % groups != home:
                        continue
                    for head in range(first_head, first_head + heads_at_once):
                        if item == mine:
                            attend_tile(phase, frame, layer, slice_, head, tile * tall, scratch + row_bytes)
                            done(control, members, rank, item)
                            mine = help_out(control, members, rank, total) if total else claim(control, rank, home)
                        item += 1
        return item, mine

    return attend_items


def _make_attend_tile(isa: Isa, shape: Shape) -> Any:
    head_dim, heads, kv_heads, block_size = shape.head_dim, shape.heads, shape.kv_heads, shape.block_size
    group, half = heads // kv_heads, head_dim // 2
    tall, put = tall_rows(isa, shape.kv_bits, shape.head_dim), _make_put_head(isa, shape)
    token_bytes = 4 * padded_columns(shape.qkv_size, isa)
    head_bytes = head_dim * block_size * shape.kv_bits // 8
    of_laid = laid_bytes(isa, shape.kv_bits, head_dim, block_size)

    @njit(nogil=True, error_model="numpy")
    def attend_tile(phase: int, frame: Any, layer: int, slice_: int, head: int, first: int, laid: int) -> None:
        scratch = laid + of_laid  # behind the chunks that this thread has laid out
        start_row, end_row = longs(frame[Frame.FIRST_ROWS] + 8 * slice_, 2)
        start = longs(frame[Frame.POSITIONS] + 8 * start_row, 1)[0]
        queries = (end_row - start_row) * group
        window = longs(frame[Frame.WINDOWS], layer + 1)[layer]
        qkv = place(frame, Frame.PRODUCT, 4 * layer) + start_row * token_bytes + 4 * head * group * head_dim
        q_norm = frame[Frame.QK_NORMS] + 4 * 2 * layer * head_dim
        cos, sin = frame[Frame.COS] + 4 * start * half, frame[Frame.SIN] + 4 * start * half
        table = frame[Frame.TABLES] + 4 * longs(frame[Frame.TABLE_STARTS], slice_ + 1)[slice_]
        keys = frame[Frame.KV] + (2 * layer * kv_heads + head) * head_bytes
        values = keys + kv_heads * head_bytes
        arguments = (
            phase, first, queries, start, window, qkv, token_bytes, q_norm, cos, sin, table, keys, values,
            frame[Frame.KV_BLOCK_BYTES], laid, scratch,
        )  # fmt: skip
        call_address(frame[Frame.ATTEND_TOKEN] if queries == group else frame[Frame.ATTEND_TILE], arguments)
        for query in range(first, min(first + (group if queries == group else tall), queries)):
            k, row = (head * group + query % group) * head_dim, start_row + query // group
            out = scratch + 4 * (query - first) * head_dim
            put(frame, layer, out, k, row)

    return attend_tile


def _make_put_head(isa: Isa, shape: Shape) -> Any:
    """`put(frame, layer, values, k, row)`: stores what attention leaves of one head."""
    head_dim, query_size, bits = shape.head_dim, shape.query_size, shape.weight_bits

    @njit(nogil=True, error_model="numpy")
    def keep(frame: Any, layer: int, values: int, k: int, row: int) -> None:
        to = place(frame, Frame.ATTENDED, 4 * layer + 1) + 4 * (row * query_size + k)
        copy(floats(values, head_dim), floats(to, head_dim))

    if puts_whole_rows(bits):
        return keep
    put = make_put(isa, bits, query_size)

    @njit(nogil=True, error_model="numpy")
    def put_head(frame: Any, layer: int, values: int, k: int, row: int) -> None:
        product = 4 * layer + 1
        x, scales = place(frame, Frame.X, product), place(frame, Frame.X_SCALES, product)
        sums = place(frame, Frame.X_SUMS, product)
        put(values, head_dim, k, row, frame[Frame.TILE_ROWS], query_size, x, scales, sums)

    return put_head


def make_put_attended(isa: Isa, shape: Shape) -> Kernel:
    """Stores what attention left as the next product's activations."""
    size, put = shape.query_size, make_put(isa, shape.weight_bits, shape.query_size)

    def put_attended(control: int, members: int, rank: int, at: int, layer: int, scratch: int) -> None:
        frame, temp, product = longs(at, FRAME_FIELDS), floats(scratch, size), 4 * layer + 1
        count, rows, groups = frame[Frame.ROWS], frame[Frame.TILE_ROWS], frame[Frame.GROUPS]
        attended, x = place(frame, Frame.ATTENDED, product), place(frame, Frame.X, product)
        scales, sums = place(frame, Frame.X_SCALES, product), place(frame, Frame.X_SUMS, product)
        tiles = (count + rows - 1) // rows
        tile = next_item(control, members, rank, groups, tiles)
        while tile >= 0:
            for row in range(tile * rows, min((tile + 1) * rows, count)):
                copy(floats(attended + 4 * row * size, size), temp)
                put(scratch, size, 0, row, rows, size, x, scales, sums)
            done(control, members, rank, tile)
            tile = next_item(control, members, rank, groups, tiles)

    return put_attended
