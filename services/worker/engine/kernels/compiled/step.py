"""A Llama's whole step as one compiled function, which every thread of a team runs.

Phase after phase: norm, QKV, write keys and values, attention, output projection, norm, gate and up, SwiGLU, down; at
the end norm and head for the rows that sample.
"""

from typing import Any

from numba import njit

from services.worker.engine.kernels.compiled.activations import puts_whole_rows
from services.worker.engine.kernels.compiled.attention import make_attend
from services.worker.engine.kernels.compiled.frame import (
    FRAME_FIELDS,
    Frame,
    Kernel,
    Shape,
    gates_at_once,
    place,
    tall_rows,
)
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.linear import make_linear
from services.worker.engine.kernels.compiled.machine import call_address, longs
from services.worker.engine.kernels.compiled.matrix_linear import make_gated_linear
from services.worker.engine.kernels.compiled.packing import padded_columns
from services.worker.engine.kernels.compiled.phases import (
    SWIGLU_PARTS,
    make_attention,
    make_norm_rows,
    make_norm_sampled,
    make_put_attended,
    make_swiglu_rows,
    make_write_kv,
)
from services.worker.engine.kernels.compiled.team import await_start, finish, leave, start


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
    kernels = {
        Frame.LINEAR.name: linears[shape.weight_bits],
        Frame.HEAD_LINEAR.name: linears[shape.head_bits],
        Frame.NORM_ROWS.name: make_norm_rows(isa, shape),
        Frame.WRITE_KV.name: make_write_kv(isa, shape),
        Frame.ATTEND.name: make_attention(isa, shape),
        Frame.ATTEND_TOKEN.name: make_attend(isa, facts["group"], **facts),
        Frame.ATTEND_TILE.name: make_attend(isa, tall_rows(isa, shape.kv_bits, shape.head_dim), **facts),
        Frame.NORM_SAMPLED.name: make_norm_sampled(isa, shape),
        "RUN": _make_run(isa, shape),
    }
    if puts_whole_rows(shape.weight_bits):
        kernels[Frame.PUT_ATTENDED.name] = make_put_attended(isa, shape)
    if gates_at_once(isa, shape):
        kernels[Frame.GATED_LINEAR.name] = make_gated_linear(shape.hidden, shape.intermediate)
    else:
        kernels[Frame.SWIGLU_ROWS.name] = make_swiglu_rows(isa, shape)
    return kernels


def most_items(isa: Isa, shape: Shape, rows: int, members: int) -> int:
    """How many items a phase of a step has at most, if it has so many rows and all of them are in one group."""
    widest = max(shape.qkv_size, shape.hidden, 2 * shape.intermediate, shape.vocabulary)
    return max(padded_columns(widest, isa) // isa.panel_columns + members, rows * max(shape.heads, SWIGLU_PARTS))


def _make_multiply(columns: int) -> Any:
    @njit(nogil=True, error_model="numpy")
    def multiply(
        team: Any, linear: Any, frame: Any, product: int, x: int, depth: int, out: int, width: int, scratch: int
    ) -> None:
        """Of `x`, a field, by `linear`: a kernel and its groups, tiles and rows per tile."""
        kernel, groups, tiles, rows = linear
        weights = longs(frame[Frame.LINEARS] + 24 * product, 3)
        arguments = (
            *team, groups, tiles, rows, depth, place(frame, x, product), place(frame, Frame.X_SCALES, product),
            place(frame, Frame.X_SUMS, product),
            weights[0], weights[1], weights[2], width // columns, out, 4 * width, scratch,
        )  # fmt: skip
        call_address(kernel, arguments)

    return multiply


def _make_run(isa: Isa, shape: Shape) -> Kernel:
    layers, hidden, intermediate, query_size = shape.layers, shape.hidden, shape.intermediate, shape.query_size
    at_once, puts_later = gates_at_once(isa, shape), puts_whole_rows(shape.weight_bits)
    multiply = _make_multiply(isa.panel_columns)
    qkv_width, hidden_width, gate_up_width, vocabulary_width = (
        padded_columns(n, isa) for n in (shape.qkv_size, hidden, 2 * intermediate, shape.vocabulary)
    )

    @njit(nogil=True, error_model="numpy")
    def gate(team: Any, linear: Any, frame: Any, at: int, layer: int, scratch: int) -> None:
        """Gate and up, and SwiGLU."""
        product = 4 * layer + 2
        if at_once:
            weights = longs(frame[Frame.LINEARS] + 24 * product, 3)
            x, to = place(frame, Frame.X, product), place(frame, Frame.X_GATED, product + 1)
            arguments = (*team, *linear[1:], x, weights[0], weights[2], to, scratch)
            call_address(frame[Frame.GATED_LINEAR], arguments)
            return
        to = place(frame, Frame.PRODUCT, product)
        multiply(team, linear, frame, product, Frame.X, hidden, to, gate_up_width, scratch)
        call_address(frame[Frame.SWIGLU_ROWS], (*team, at, layer, scratch))

    @njit(nogil=True, error_model="numpy")
    def step(rank: int, members: int, control: int, at: int) -> None:
        frame, team = longs(at, FRAME_FIELDS), (control, members, rank)
        scratch = frame[Frame.SCRATCH] + rank * frame[Frame.SCRATCH_BYTES]
        rows = frame[Frame.TILE_ROWS]
        linear = (frame[Frame.LINEAR], frame[Frame.GROUPS], (frame[Frame.ROWS] + rows - 1) // rows, rows)
        for layer in range(layers):
            qkv, out, down = 4 * layer, 4 * layer + 1, 4 * layer + 3
            to = place(frame, Frame.PRODUCT, qkv)
            call_address(frame[Frame.NORM_ROWS], (*team, at, 2 * layer, scratch))
            multiply(team, linear, frame, qkv, Frame.X, hidden, to, qkv_width, scratch)
            call_address(frame[Frame.WRITE_KV], (*team, at, layer, scratch))
            call_address(frame[Frame.ATTEND], (*team, at, layer, scratch))
            if puts_later:
                call_address(frame[Frame.PUT_ATTENDED], (*team, at, layer, scratch))
            to = place(frame, Frame.DELTA, out)
            multiply(team, linear, frame, out, Frame.X, query_size, to, hidden_width, scratch)
            call_address(frame[Frame.NORM_ROWS], (*team, at, 2 * layer + 1, scratch))
            gate(team, linear, frame, at, layer, scratch)
            to = place(frame, Frame.DELTA, down)
            multiply(team, linear, frame, down, Frame.X_GATED, intermediate, to, hidden_width, scratch)
        if frame[Frame.SAMPLED]:
            rows = frame[Frame.SAMPLED_TILE_ROWS]
            head = (frame[Frame.HEAD_LINEAR], 1, (frame[Frame.SAMPLED] + rows - 1) // rows, rows)
            call_address(frame[Frame.NORM_SAMPLED], (*team, at, layers, scratch))
            multiply(team, head, frame, 4 * layers, Frame.X, hidden, frame[Frame.LOGITS], vocabulary_width, scratch)

    def run(rank: int, members: int, control: int, frame: int) -> None:
        if rank == 0:
            start(control, members, longs(frame, FRAME_FIELDS)[Frame.PLACE_BYTES] != 0)
            step(rank, members, control, frame)
            finish(control, members)
            return
        while await_start(control, rank):
            step(rank, members, control, frame)
            leave(control, rank)

    return run
