"""Tiles: the inner loops of matrix products, as LLVM vector code behind numba intrinsics. Here those of float weights.

A tile multiplies `rows` rows of activations by some columns of weights (or of keys, or of values), with one vector
accumulator for each row and vector of columns, all in registers. An output is summed over k in ascending order whatever
the tile's shape, so that a row's result does not depend on how many rows are computed together.

Layouts (see `packing`): activations are [k][rows] float32, a tile's rows side by side, or [k / 2][rows] words of two
bfloat16; weights are panels of [k / per_word][panel_columns] 32-bit words, each holding `per_word` successive k of one
column. The addresses that the intrinsics take are integers; whoever calls answers for their bounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.vectors import (
    F32,
    I32,
    I64,
    Builder,
    Value,
    add_pair_products,
    at,
    constant,
    fetch_lines,
    load,
    load_splat,
    multiply_add,
    pointer,
    vector,
)

GROUP = 32  # successive k that share a scale in 4-bit weights, and in the activations that they meet
RUN_BYTES = 64  # of k that AMX multiplies at once; 8-bit weights are padded to whole runs of as many k


def _multiply_floats(builder: Builder, total: Value, x: Value, weight: Value) -> Value:
    return multiply_add(builder, x, weight, total)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How weights lie in memory, and how they meet activations.

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


def _decode_bfloat16_pairs(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    words = load(builder, where, I32, lanes)
    even = builder.shl(words, constant(I32, lanes, 16))
    odd = builder.and_(words, constant(I32, lanes, 0xFFFF0000))
    return [builder.bitcast(part, vector(F32, lanes)) for part in (even, odd)]


def load_words(builder: Builder, where: Value, lanes: int, _: int) -> list[Value]:
    return [load(builder, where, I32, lanes)]


FLOAT32 = WeightFormat(4, 1, _decode_float32)
BFLOAT16_PAIRS = WeightFormat(4, 2, _decode_bfloat16_pairs)  # packed weights
BFLOAT16_DOTS = WeightFormat(4, 1, load_words, 1, I32, add_pair_products)  # the same, with activations in pairs as well


@dataclass(frozen=True, slots=True)
class Tile:
    """The loop over k of one tile: `rows` times `vectors` accumulators."""

    lanes: int
    rows: int
    vectors: int
    format: WeightFormat
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


def panel_tile(isa: Isa, rows: int, panels: int, weights: WeightFormat) -> Tile:
    return Tile(isa.lanes, rows, panels * isa.panel_columns // isa.lanes, weights, 4, 4 * rows)


def float_panels(isa: Isa, rows: int, panels: int, weights: WeightFormat) -> Any:
    """Intrinsic (activations, weights, panel_bytes, words, out, out_row_bytes, ahead): out = activations x panels.

    `panels` adjoining panels, `panel_bytes` apart, each of `words` words of k (an even number); out is
    [rows][panels * panel_columns] within rows of `out_row_bytes`. A panel's worth of bytes at `ahead` is fetched into
    the cache meanwhile; no memory need be there.
    """
    tile = panel_tile(isa, rows, panels, weights)

    @intrinsic
    def multiply(
        _: Any, activations: Any, weights: Any, panel_bytes: Any, words: Any, out: Any, out_row_bytes: Any, ahead: Any
    ) -> Any:
        def generate(context: Any, builder: Builder, _: Any, arguments: Any) -> Value:
            activations, weights, panel_bytes, words, out, out_row_bytes, ahead = arguments
            sums = tile.zeros(builder)
            columns = panel_columns(builder, isa, panels, weights, panel_bytes)
            row_bytes = 4 * isa.panel_columns
            x, beyond = pointer(builder, activations), pointer(builder, ahead)
            tile.accumulate(builder, sums, x, columns, row_bytes, words, unroll=2, ahead=beyond)
            tile.write(builder, sums, pointer(builder, out), out_row_bytes)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return multiply


def panel_columns(
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
