"""A Llama's whole step as one compiled function, which every thread of a team runs.

Phase after phase, a barrier between: norm, QKV, write keys and values, attention, output projection, norm, gate and up,
SwiGLU, down; at the end norm and head for the rows that sample.
"""

from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.attention import make_attend
from services.worker.engine.kernels.compiled.frame import (
    FRAME_FIELDS,
    PHASES_PER_LAYER,
    Frame,
    Kernel,
    Shape,
    tall_rows,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.linear import make_linear
from services.worker.engine.kernels.compiled.machine import call_address, longs
from services.worker.engine.kernels.compiled.packing import padded_columns
from services.worker.engine.kernels.compiled.phases import (
    make_attention,
    make_norm_rows,
    make_norm_sampled,
    make_swiglu_rows,
    make_write_kv,
)
from services.worker.engine.kernels.compiled.team import await_start, start


def make_kernels(isa: Isa, shape: Shape) -> dict[str, Kernel]:
    """The functions that a step is made of, by the name of their address in the frame, and "RUN".

    RUN(rank, members, control, frame), control and frame being addresses: rank 0 does one step with the others' help,
    the others help until they are stopped.
    """
    linears = {bits: make_linear(isa, bits) for bits in {shape.weight_bits, shape.head_bits}}
    facts: Any = {
        "group": shape.heads // shape.kv_heads, "head_dim": shape.head_dim, "block_size": shape.block_size,
        "kv_bits": shape.kv_bits, "qk_norm": shape.qk_norm, "eps": shape.eps,
    }  # fmt: skip
    return {
        Frame.LINEAR.name: linears[shape.weight_bits],
        Frame.HEAD_LINEAR.name: linears[shape.head_bits],
        Frame.NORM_ROWS.name: make_norm_rows(isa, shape),
        Frame.WRITE_KV.name: make_write_kv(isa, shape),
        Frame.ATTEND.name: make_attention(isa, shape),
        Frame.ATTEND_TOKEN.name: make_attend(isa, facts["group"], **facts),
        Frame.ATTEND_TILE.name: make_attend(isa, tall_rows(isa), **facts),
        Frame.SWIGLU_ROWS.name: make_swiglu_rows(isa, shape),
        Frame.NORM_SAMPLED.name: make_norm_sampled(isa, shape),
        "RUN": _make_run(isa, shape),
    }


def _make_run(isa: Isa, shape: Shape) -> Kernel:
    layers, hidden, intermediate, query_size = shape.layers, shape.hidden, shape.intermediate, shape.query_size
    phases, columns = shape.phases, isa.panel_columns
    qkv_width, hidden_width, gate_up_width, vocabulary_width = (
        padded_columns(n, isa) for n in (shape.qkv_size, hidden, 2 * intermediate, shape.vocabulary)
    )

    @njit(nogil=True, error_model="numpy")
    def multiply(
        kernel: int, control: int, members: int, frame: Any, phase: int, which: int, tiles: int, rows: int, depth: int,
        out: int, width: int,
    ) -> None:  # fmt: skip
        weights = longs(frame[Frame.LINEARS] + 24 * which, 3)
        arguments = (
            control, members, phase, tiles, rows, depth, frame[Frame.X], frame[Frame.X_SCALES], frame[Frame.X_SUMS],
            weights[0], weights[1], weights[2], width // columns, out, 4 * width,
        )  # fmt: skip
        call_address(kernel, arguments)

    @njit(nogil=True, error_model="numpy")
    def step(rank: int, members: int, control: int, at: int) -> None:
        frame = longs(at, FRAME_FIELDS)
        scratch = frame[Frame.SCRATCH] + rank * frame[Frame.SCRATCH_BYTES]
        rows, linear = frame[Frame.TILE_ROWS], frame[Frame.LINEAR]
        tiles = (frame[Frame.ROWS] + rows - 1) // rows
        delta, product = frame[Frame.DELTA], frame[Frame.PRODUCT]
        sampled = frame[Frame.SAMPLED]  # after the last barrier, it may be the next step's already
        for layer in range(layers):
            phase = layer * PHASES_PER_LAYER
            call_address(frame[Frame.NORM_ROWS], (control, members, at, phase, 2 * layer, scratch))
            multiply(linear, control, members, frame, phase + 1, 4 * layer, tiles, rows, hidden, product, qkv_width)
            call_address(frame[Frame.WRITE_KV], (control, members, at, phase + 2, layer, scratch))
            call_address(frame[Frame.ATTEND], (control, members, at, phase + 3, layer, scratch))
            multiply(
                linear, control, members, frame, phase + 4, 4 * layer + 1, tiles, rows, query_size, delta, hidden_width
            )
            call_address(frame[Frame.NORM_ROWS], (control, members, at, phase + 5, 2 * layer + 1, scratch))
            multiply(
                linear, control, members, frame, phase + 6, 4 * layer + 2, tiles, rows, hidden, product, gate_up_width
            )
            call_address(frame[Frame.SWIGLU_ROWS], (control, members, at, phase + 7, layer, scratch))
            multiply(
                linear,
                control,
                members,
                frame,
                phase + 8,
                4 * layer + 3,
                tiles,
                rows,
                intermediate,
                delta,
                hidden_width,
            )
        if sampled:
            phase, rows = layers * PHASES_PER_LAYER, frame[Frame.SAMPLED_TILE_ROWS]
            tiles, head, out = (sampled + rows - 1) // rows, frame[Frame.HEAD_LINEAR], frame[Frame.LOGITS]
            call_address(frame[Frame.NORM_SAMPLED], (control, members, at, phase, layers, scratch))
            multiply(head, control, members, frame, phase + 1, 4 * layers, tiles, rows, hidden, out, vocabulary_width)

    def run(rank: int, members: int, control: int, frame: int) -> None:
        if rank == 0:
            start(control, members, phases)
            step(rank, members, control, frame)
            return
        while await_start(control, rank):
            step(rank, members, control, frame)

    return run
