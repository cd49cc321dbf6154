"""Matrix products by AMX, shared out over a team: a panel of weights at a time, and two tiles of rows together."""

from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.machine import floats
from services.worker.engine.kernels.compiled.matrix_tiles import (
    PANEL_COLUMNS,
    STEP_BYTES,
    TILE_DEPTH,
    TILE_ROWS,
    begin_tiles,
    end_tiles,
    scale_sums,
    swiglu_pairs,
    tile_products,
)
from services.worker.engine.kernels.compiled.rows import add, add_to
from services.worker.engine.kernels.compiled.sharing import panels_of, share_out
from services.worker.engine.kernels.compiled.team import done, next_item
from services.worker.engine.kernels.compiled.tiles import RUN_BYTES

_AHEAD_BYTES = 8192  # how far before its use a weight is asked for by a tile, or pair, that uses it alone
_FEW_PANELS = 4  # at once, by a tile or pair that uses them alone: fewer items to get
_FEW_SHARES, _MANY_SHARES = 8, 16  # of a panel that is fetched while others compute
_NOTHING, _LARGE, _SMALL, _ALL = range(4)  # what a tile, or pair, fetches: a share, or as much as it uses
_STEP_LINES = STEP_BYTES // 64
_SUMS = 4 * PANEL_COLUMNS  # bytes of a row of a panel's sums
_WORD = 2  # bytes of a bfloat16
_PAIRS = 8  # of tiles that meet gate's panel before up's
GATED_SUMS = (_PAIRS + 1) * 2 * TILE_ROWS * PANEL_COLUMNS  # float32 in scratch memory


def make_matrix_linear(bits: int) -> Any:
    """`linear(...)` as `make_linear` has it, for activations in runs of RUN_BYTES; of 16 bits or 8."""
    multiply, finish = _make_multiply(bits), _make_finish(bits)
    word = bits // 8
    direct = bits == 16  # whether sums are what is wanted

    def linear(
        control: int, members: int, rank: int, groups: int, tiles: int, rows: int, depth: int, x: int, x_scales: int,
        x_sums: int, words: int, scales: int, bias: int, panels: int, out: int, out_row_bytes: int, scratch: int,
    ) -> None:  # fmt: skip
        row_bytes = (word * depth + RUN_BYTES - 1) // RUN_BYTES * RUN_BYTES
        panel_bytes, tile_bytes, out_tile_bytes = row_bytes * PANEL_COLUMNS, row_bytes * rows, rows * out_row_bytes
        widest = _FEW_PANELS if tiles <= 2 * groups else 1
        parts, items = share_out(panels, widest, groups, members)
        item = next_item(control, members, rank, parts, items)
        while item >= 0:
            begin_tiles(rows)
            group, first_panel, end = panels_of(item, parts, panels, widest, groups)
            for panel in range(first_panel, min(first_panel + widest, end)):
                weights, to = words + panel * panel_bytes, out + panel * _SUMS
                of_columns = scales + panel * _SUMS
                biases = bias + panel * _SUMS if bias else 0
                for tile in range(group, tiles, 2 * groups):
                    pair = tile + groups < tiles
                    fetch = _fetch(tile, groups, tiles, panel_bytes)
                    at, sums = x + tile * tile_bytes, to + tile * out_tile_bytes
                    apart, out_apart = groups * tile_bytes, groups * out_tile_bytes
                    if direct and not bias:
                        multiply(pair, fetch, rows, row_bytes, at, apart, weights, sums, out_row_bytes, out_apart)
                        continue
                    multiply(pair, fetch, rows, row_bytes, at, apart, weights, scratch, _SUMS, rows * _SUMS)
                    for n in range(2 if pair else 1):
                        first = 4 * (tile + n * groups) * rows
                        finish(
                            scratch + n * rows * _SUMS, rows, x_scales + first, x_sums + first, of_columns, biases,
                            sums + n * out_apart, out_row_bytes,
                        )  # fmt: skip
            end_tiles()
            done(control, members, rank, item)
            item = next_item(control, members, rank, parts, items)

    return linear


def _make_finish(bits: int) -> Any:
    @njit(nogil=True, error_model="numpy")
    def finish(
        sums: int, rows: int, x_scales: int, x_sums: int, scales: int, bias: int, out: int, out_row_bytes: int
    ) -> None:
        """A tile's outputs of its sums with a panel. bias: 0 if there is none.

        Nothing but what is final is written there, since a thread that was held up may do so once more.
        """
        if bits == 8:
            to, row_bytes = (sums, _SUMS) if bias else (out, out_row_bytes)
            scale_sums(sums, rows, x_scales, x_sums, scales, to, row_bytes)
        if bias:
            biases = floats(bias, PANEL_COLUMNS)
            for row in range(rows):
                add(floats(sums + row * _SUMS, PANEL_COLUMNS), biases, floats(out + row * out_row_bytes, PANEL_COLUMNS))

    return finish


def make_gated_linear(hidden: int, intermediate: int) -> Any:
    """The product of gate and up and SwiGLU of it, as the activations of the product down. Sums never leave the cache.

    Arguments: control, members, rank, groups of tiles; tiles and rows per tile; addresses of activations, of the
    weights' words, gate's panels before up's, and of the bias (0: none), of the activations to write; scratch memory of
    GATED_SUMS float32.
    """
    multiply_tiles, gate_tiles = _make_multiply_tiles(hidden), _make_gate_tiles(intermediate)
    assert PANEL_COLUMNS == TILE_DEPTH  # what a panel leaves is a step of the product down
    panels = intermediate // PANEL_COLUMNS
    panel_bytes, up_bytes = _WORD * hidden * PANEL_COLUMNS, _WORD * hidden * intermediate

    def gated(
        control: int, members: int, rank: int, groups: int, tiles: int, rows: int, x: int, words: int, bias: int,
        to: int, scratch: int,
    ) -> None:  # fmt: skip
        pair_bytes = 2 * rows * _SUMS
        ups = scratch + _PAIRS * pair_bytes
        parts, items = share_out(panels, 1, groups, members)
        item = next_item(control, members, rank, parts, items)
        while item >= 0:
            begin_tiles(rows)
            group, panel, end = panels_of(item, parts, panels, 1, groups)
            first = group if panel < end else tiles
            weights = words + panel * panel_bytes
            # Gate's panel meets several pairs of tiles before up's does, and so stays in the nearest cache meanwhile.
            while first < tiles:
                last, gates = min(tiles, first + 2 * groups * _PAIRS), scratch
                for tile in range(first, last, 2 * groups):
                    multiply_tiles(tile, groups, tiles, rows, x, weights, gates)
                    gates += pair_bytes
                gates = scratch
                for tile in range(first, last, 2 * groups):
                    count = multiply_tiles(tile, groups, tiles, rows, x, weights + up_bytes, ups)
                    gate_tiles(count, rows, gates, ups, bias, panel, to, tile, groups)
                    gates += pair_bytes
                first = last
            end_tiles()
            done(control, members, rank, item)
            item = next_item(control, members, rank, parts, items)

    return gated


def _make_multiply_tiles(depth: int) -> Any:
    multiply, row_bytes = _make_multiply(16), _WORD * depth

    @njit(nogil=True, error_model="numpy")
    def multiply_tiles(tile: int, groups: int, tiles: int, rows: int, x: int, weights: int, sums: int) -> int:
        """The next two tiles of the group, or the last one, with one panel: how many they were."""
        pair, tile_bytes = tile + groups < tiles, row_bytes * rows
        fetch, at = _fetch(tile, groups, tiles, row_bytes * PANEL_COLUMNS), x + tile * tile_bytes
        multiply(pair, fetch, rows, row_bytes, at, groups * tile_bytes, weights, sums, _SUMS, rows * _SUMS)
        return 2 if pair else 1

    return multiply_tiles


def _make_gate_tiles(intermediate: int) -> Any:
    @njit(nogil=True, error_model="numpy")
    def gate_tiles(
        count: int, rows: int, gates: int, ups: int, bias: int, panel: int, to: int, tile: int, groups: int
    ) -> None:
        """SwiGLU of the sums of `count` tiles with one panel of gate and one of up."""
        if bias:
            of_gate = floats(bias + panel * _SUMS, PANEL_COLUMNS)
            of_up = floats(bias + 4 * intermediate + panel * _SUMS, PANEL_COLUMNS)
            for row in range(count * rows):
                add_to(floats(gates + row * _SUMS, PANEL_COLUMNS), of_gate)
                add_to(floats(ups + row * _SUMS, PANEL_COLUMNS), of_up)
        block = rows * PANEL_COLUMNS
        for n in range(count):
            there = to + _WORD * ((tile + n * groups) * rows * intermediate + panel * block)
            swiglu_pairs(gates + 4 * n * block, ups + 4 * n * block, block, there)

    return gate_tiles


def _make_multiply(bits: int) -> Any:
    few, many = _STEP_LINES // _FEW_SHARES, _STEP_LINES // _MANY_SHARES
    single, single_ahead = (tile_products(1, bits=bits, fetched_lines=lines) for lines in (0, _STEP_LINES))
    pair, pair_ahead, pair_large, pair_small = (
        tile_products(2, bits=bits, passing=True, fetched_lines=lines) for lines in (0, _STEP_LINES, few, many)
    )

    @njit(nogil=True, error_model="numpy")
    def multiply(
        both: bool, fetch: Any, rows: int, row_bytes: int, x: int, apart: int, weights: int, out: int,
        out_row_bytes: int, out_apart: int,
    ) -> None:  # fmt: skip
        """One tile's rows, or two tiles', with one panel. `fetch`: see `_fetch`."""
        share, further = fetch
        steps, step_bytes = row_bytes // RUN_BYTES, RUN_BYTES * rows
        arguments = (x, RUN_BYTES, step_bytes, apart, weights, steps, out, out_row_bytes, out_apart, weights + further)
        if both and share == _ALL:
            pair_ahead(*arguments)
        elif both and share == _LARGE:
            pair_large(*arguments)
        elif both and share == _SMALL:
            pair_small(*arguments)
        elif both:
            pair(*arguments)
        elif share == _ALL:
            single_ahead(*arguments)
        else:
            single(*arguments)

    return multiply


@njit(nogil=True, error_model="numpy")
def _fetch(tile: int, groups: int, tiles: int, panel_bytes: int) -> Any:
    """What weights are fetched while a tile, or pair, uses a panel: how much of it, and how many bytes further.

    A single one has the weights from memory, and asks for what it uses next. Of several, the first fetch a share of the
    next panel each: the smaller, the less they wait for it.
    """
    before, count = tile // groups // 2, (tiles + 2 * groups - 1) // (2 * groups)
    if count == 1:
        return _ALL, _AHEAD_BYTES
    shares = _FEW_SHARES if count < _MANY_SHARES else _MANY_SHARES
    if before >= shares:
        return _NOTHING, 0
    return _LARGE if shares == _FEW_SHARES else _SMALL, panel_bytes + before * (panel_bytes // shares)
