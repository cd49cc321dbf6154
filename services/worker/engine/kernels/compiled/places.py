"""Memory for the activations of a step, between one product and the next."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.kernels.compiled.activations import puts_whole_rows
from services.worker.engine.kernels.compiled.frame import Frame, Shape, gates_at_once
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.linear import TALLEST
from services.worker.engine.kernels.compiled.packing import aligned_zeros, padded_columns
from services.worker.engine.kernels.compiled.tiles import GROUP

_LINE = 64  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """What products read and write, of steps of at most `rows` rows."""

    rows: int
    fields: dict[Frame, int]  # what a frame says of them
    memory: npt.NDArray[np.uint8]

    @classmethod
    def shared(cls, isa: Isa, shape: Shape, rows: int) -> "Places":
        """One place for all products, which so stays in a core's cache."""
        return cls._make(isa, shape, rows, 1)

    @classmethod
    def apart(cls, isa: Isa, shape: Shape, rows: int) -> "Places":
        """A place for each product, so that what one has read and written stays until the step ends."""
        return cls._make(isa, shape, rows, 4 * shape.layers + 1)

    @classmethod
    def _make(cls, isa: Isa, shape: Shape, rows: int, places: int) -> "Places":
        deepest = max(shape.hidden, shape.query_size)
        scales = max(deepest, shape.intermediate) // GROUP + 1
        gate_up = 0 if gates_at_once(isa, shape) else 2 * shape.intermediate
        widths = {  # in words of a row
            Frame.HIDDEN: shape.hidden,
            Frame.DELTA: padded_columns(shape.hidden, isa),
            Frame.PRODUCT: padded_columns(max(shape.qkv_size, gate_up), isa),
            Frame.ATTENDED: shape.query_size if puts_whole_rows(shape.weight_bits) else 0,
            Frame.X: deepest,
            Frame.X_GATED: shape.intermediate,
            Frame.X_SCALES: scales,
            Frame.X_SUMS: scales,
        }
        offsets, size = {}, 0
        for field, width in widths.items():
            offsets[field] = size
            size += -(-4 * width * (rows + TALLEST) // _LINE) * _LINE  # whole tiles, of which the last is not full
        memory = aligned_zeros((places * size,), np.uint8)
        fields = {field: memory.ctypes.data + offset for field, offset in offsets.items()}
        return cls(rows, fields | {Frame.PLACE_BYTES: size if places > 1 else 0}, memory)
