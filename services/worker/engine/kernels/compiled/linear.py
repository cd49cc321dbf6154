"""Matrix products of packed activations and packed weights, shared out over a team."""

from functools import cache
from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.integer_tiles import byte_panels, nibble_panels
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.machine import floats
from services.worker.engine.kernels.compiled.matrix_linear import make_matrix_linear
from services.worker.engine.kernels.compiled.matrix_tiles import TILE_ROWS
from services.worker.engine.kernels.compiled.rows import add
from services.worker.engine.kernels.compiled.sharing import panels_of, share_out
from services.worker.engine.kernels.compiled.team import done, next_item
from services.worker.engine.kernels.compiled.tiles import (
    BFLOAT16_DOTS,
    BFLOAT16_PAIRS,
    FLOAT32,
    GROUP,
    RUN_BYTES,
    float_panels,
)

_HEIGHTS = (1, 2, 3, 4, 6, 8, 12)  # rows of the tiles that are made
TALLEST = max(*_HEIGHTS, TILE_ROWS)
_TILE_COST = 0.5  # of starting another tile, in rows
# From so many tiles for each thread on it pays that each reads all weights, to have its rows to itself. AMX is through
# with fewer sooner than a panel could be read twice. Measured with two threads.
_GROUP_TILES, _MATRIX_GROUP_TILES = 2, 10
_AHEAD_BYTES = 8192  # how far before its use a weight is asked for, where memory bounds a tile


@cache
def tile_rows(isa: Isa, bits: int, rows: int) -> int:
    """How many rows a tile should have so that `rows` rows waste least, with weights of so many bits."""
    if isa.uses_matrices(bits):
        return -(-rows // -(-rows // TILE_ROWS))
    heights = [height for height in _HEIGHTS if _panels(height, isa.accumulators)]
    return min(reversed(heights), key=lambda height: -(-rows // height) * (height + _TILE_COST))


def tile_groups(isa: Isa, bits: int, tiles: int, members: int) -> int:
    """How many groups so many tiles are shared out by, one for each thread where there are enough."""
    if isa.uses_matrices(bits):
        return members if tiles >= _MATRIX_GROUP_TILES * members else 1
    return max(1, min(members, tiles // _GROUP_TILES))


def _panels(rows: int, accumulators: int) -> int:
    """How many panels a tile of so many rows takes at once; 0 if it does not fit into the registers."""
    return 4 if 8 * rows <= accumulators else 2 if 4 * rows <= accumulators else 1 if 2 * rows <= accumulators else 0


def make_linear(isa: Isa, bits: int) -> Any:
    """`linear(...)`: out = activations x weights, a phase of the team.

    Arguments: control, members, rank, groups of tiles; tiles and rows per tile; depth (k) of both; addresses of
    activations, their scales and sums; of the weights' words and scales and of the bias (0: none); panels; the address
    of out and the bytes of its rows; scratch memory for the sums of two tiles. out has room for whole tiles.
    """
    if isa.uses_matrices(bits):
        return make_matrix_linear(bits)
    columns, width_of, multiply = isa.panel_columns, njit(_panels), _make_multiply(isa, bits)
    accumulators = isa.accumulators
    per_word, activation_bytes = 32 // bits, isa.activation_bits(bits) // 8
    grain, grouped = RUN_BYTES if bits == 8 else GROUP, bits == 4

    def linear(
        control: int, members: int, rank: int, groups: int, tiles: int, rows: int, depth: int, x: int, x_scales: int,
        x_sums: int, words: int, scales: int, bias: int, panels: int, out: int, out_row_bytes: int, scratch: int,
    ) -> None:  # fmt: skip
        widest = max(1, width_of(rows, accumulators))
        deep = (depth + grain - 1) // grain * grain
        steps = deep // GROUP if grouped else deep // per_word
        panel_bytes = deep // per_word * columns * 4
        of_scales = deep // GROUP * 2 * 2 * columns if grouped else 4 * columns
        of_rows = 4 * rows * (deep // GROUP if grouped else 1)
        parts, items = share_out(panels, widest, groups, members)
        item = next_item(control, members, rank, parts, items)
        while item >= 0:
            group, start, end = panels_of(item, parts, panels, widest, groups)
            width = widest if start + widest <= end else 1
            for panel in range(start, min(start + widest, end), width):
                w, s, o = words + panel * panel_bytes, scales + panel * of_scales, out + panel * columns * 4
                for tile in range(group, tiles, groups):
                    at = x + tile * deep * rows * activation_bytes
                    # The first tile has these weights from memory, the others from the cache: they have time to
                    # fetch the next ones.
                    before = tile // groups
                    ahead = w
                    if before == 0:
                        ahead += _AHEAD_BYTES
                    elif before <= width:
                        ahead += (width + before - 1) * panel_bytes
                    to, row_bytes = o + tile * rows * out_row_bytes, out_row_bytes
                    if bias:
                        to, row_bytes = scratch, width * columns * 4
                    multiply(
                        rows, width, at, x_scales + tile * of_rows, x_sums + tile * of_rows, w, s, panel_bytes,
                        of_scales, steps, to, row_bytes, ahead,
                    )  # fmt: skip
                    if bias:
                        biases = floats(bias + panel * columns * 4, width * columns)
                        for row in range(rows):
                            sums = floats(scratch + row * row_bytes, width * columns)
                            add(sums, biases, floats(o + (tile * rows + row) * out_row_bytes, width * columns))
            done(control, members, rank, item)
            item = next_item(control, members, rank, parts, items)

    return linear


def _make_multiply(isa: Isa, bits: int) -> Any:
    one, two, three, four, six, eight, twelve = (
        _tile(isa, height, bits, _panels(height, isa.accumulators) or 1) for height in _HEIGHTS
    )
    narrow_one, narrow_two, narrow_three, narrow_four, narrow_six = (
        _tile(isa, height, bits, 1) for height in _HEIGHTS[:5]
    )

    @njit(nogil=True, error_model="numpy")
    def multiply_panel(rows: int, *arguments: int) -> None:
        if rows == 1:
            narrow_one(*arguments)
        elif rows == 2:
            narrow_two(*arguments)
        elif rows == 3:
            narrow_three(*arguments)
        elif rows == 4:
            narrow_four(*arguments)
        elif rows == 6:
            narrow_six(*arguments)
        elif rows == 8:
            eight(*arguments)
        else:
            twelve(*arguments)

    @njit(nogil=True, error_model="numpy")
    def multiply(rows: int, panels: int, *arguments: int) -> None:
        """The tile of so many rows and panels: one, or as many as it can take."""
        if panels == 1:
            multiply_panel(rows, *arguments)
        elif rows == 1:
            one(*arguments)
        elif rows == 2:
            two(*arguments)
        elif rows == 3:
            three(*arguments)
        elif rows == 4:
            four(*arguments)
        else:
            six(*arguments)

    return multiply


@cache
def _tile(isa: Isa, rows: int, bits: int, panels: int) -> Any:
    """A tile behind one signature: that of `nibble_panels`."""
    if bits in (4, 8):
        return nibble_panels(isa, rows, panels) if bits == 4 else byte_panels(isa, rows, panels)
    halves = BFLOAT16_DOTS if isa.bfloat16_dots else BFLOAT16_PAIRS
    multiply = float_panels(isa, rows, panels, halves if bits == 16 else FLOAT32)

    @njit(nogil=True, error_model="numpy")
    def tile(
        x: int, scales: int, sums: int, words: int, weight_scales: int, panel_bytes: int, scale_bytes: int,
        steps: int, out: int, out_row_bytes: int, ahead: int,
    ) -> None:  # fmt: skip
        multiply(x, words, panel_bytes, steps, out, out_row_bytes, ahead)

    return tile
