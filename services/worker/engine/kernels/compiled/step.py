"""A Llama's whole step as one compiled function, which every thread of a team runs.

Phase after phase, a barrier between: norm, QKV, write keys and values, attention, output projection, norm, gate and up,
SwiGLU, down; at the end norm and head for the rows that sample.
"""

from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.attention import make_attend
from services.worker.engine.kernels.compiled.frame import (
    FRAME_FIELDS,
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
    columns = isa.panel_columns
    qkv_width, hidden_width, gate_up_width, vocabulary_width = (
        padded_columns(n, isa) for n in (shape.qkv_size, hidden, 2 * intermediate, shape.vocabulary)
    )

    @njit(nogil=True, error_model="numpy")
    def multiply(team: Any, linear: Any, frame: Any, which: int, depth: int, out: int, width: int) -> None:
        """By `linear`, a kernel and its groups, tiles and rows per tile."""
        kernel, groups, tiles, rows = linear
        weights = longs(frame[Frame.LINEARS] + 24 * which, 3)
        arguments = (
            *team, groups, tiles, rows, depth, frame[Frame.X], frame[Frame.X_SCALES], frame[Frame.X_SUMS],
            weights[0], weights[1], weights[2], width // columns, out, 4 * width,
        )  # fmt: skip
        call_address(kernel, arguments)

    @njit(nogil=True, error_model="numpy")
    def step(rank: int, members: int, control: int, at: int) -> None:
        frame, team = longs(at, FRAME_FIELDS), (control, members, rank)
        scratch = frame[Frame.SCRATCH] + rank * frame[Frame.SCRATCH_BYTES]
        rows = frame[Frame.TILE_ROWS]
        linear = (frame[Frame.LINEAR], frame[Frame.GROUPS], (frame[Frame.ROWS] + rows - 1) // rows, rows)
        delta, product = frame[Frame.DELTA], frame[Frame.PRODUCT]
        sampled = frame[Frame.SAMPLED]  # after the last barrier, it may be the next step's already
        for layer in range(layers):
            which = 4 * layer
            call_address(frame[Frame.NORM_ROWS], (*team, at, 2 * layer, scratch))
            multiply(team, linear, frame, which, hidden, product, qkv_width)
            call_address(frame[Frame.WRITE_KV], (*team, at, layer, scratch))
            call_address(frame[Frame.ATTEND], (*team, at, layer, scratch))
            multiply(team, linear, frame, which + 1, query_size, delta, hidden_width)
            call_address(frame[Frame.NORM_ROWS], (*team, at, 2 * layer + 1, scratch))
            multiply(team, linear, frame, which + 2, hidden, product, gate_up_width)
            call_address(frame[Frame.SWIGLU_ROWS], (*team, at, layer, scratch))
            multiply(team, linear, frame, which + 3, intermediate, delta, hidden_width)
        if sampled:
            rows = frame[Frame.SAMPLED_TILE_ROWS]
            head = (frame[Frame.HEAD_LINEAR], 1, (sampled + rows - 1) // rows, rows)
            call_address(frame[Frame.NORM_SAMPLED], (*team, at, layers, scratch))
            multiply(team, head, frame, 4 * layers, hidden, frame[Frame.LOGITS], vocabulary_width)

    def run(rank: int, members: int, control: int, frame: int) -> None:
        if rank == 0:
            start(control, members)
            step(rank, members, control, frame)
            return
        while await_start(control, rank):
            step(rank, members, control, frame)

    return run
