"""The product of gate and up with SwiGLU, by AMX, against exact arithmetic on the same numbers. See `conftest`."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.kernels.compiled.linear import tile_rows
from services.worker.engine.kernels.compiled.matrix_linear import GATED_SUMS, make_gated_linear
from services.worker.engine.kernels.compiled.packing import Arena, aligned_zeros, pack, packed_bytes
from services.worker.engine.kernels.compiled.team import new_control
from services.worker.engine.kernels.compiled.tiles import GROUP
from tests.services.worker.engine.kernels.compiled.calling import ISA, compiled
from tests.services.worker.engine.kernels.compiled.test_linear import in_tiles

HIDDEN, INTERMEDIATE = 3 * GROUP, 5 * GROUP


def gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, height: int | None = None, members: int = 1, groups: int = 1
) -> Tensor:
    """What the kernel leaves, as [rows, INTERMEDIATE] bfloat16."""
    height = height or tile_rows(ISA, 16, len(x))
    tiles = -(-len(x) // height)
    packed = pack(weight, 16, ISA, Arena(packed_bytes(*weight.shape, 16, ISA)))
    runs = in_tiles(x.to(torch.bfloat16).view(torch.int16).unflatten(1, (-1, GROUP)), height).numpy()
    biases = np.zeros(0) if bias is None else bias.numpy()
    out, control = aligned_zeros((tiles, INTERMEDIATE // GROUP, height, GROUP), np.int16), new_control(members)

    def kernel(rank: int) -> None:
        compiled(_make_gated, HIDDEN, INTERMEDIATE)(
            control, members, rank, groups, tiles, height, runs, packed.words, biases if len(biases) else 0, out,
            np.zeros(GATED_SUMS, np.float32),
        )  # fmt: skip

    threads = [threading.Thread(target=kernel, args=(rank,)) for rank in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = torch.from_numpy(np.ascontiguousarray(out.transpose(0, 2, 1, 3))).view(torch.bfloat16)
    return rows.reshape(-1, INTERMEDIATE)[: len(x)]


def _make_gated(_: object, hidden: int, intermediate: int) -> object:
    return make_gated_linear(hidden, intermediate)


def numbers(rows: int, seed: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator) * scale
    weight = torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) * 0.3
    return x, weight, torch.randn(2 * INTERMEDIATE, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 90), st.integers(250, 600)),
    biased=st.booleans(),
    members=st.integers(1, 3),
    groups=st.integers(1, 3),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_is_swiglu_of_the_products(
    rows: int, biased: bool, members: int, groups: int, scale: float, seed: int
) -> None:
    x, weight, bias = numbers(rows, seed, scale=scale)
    ours = gated(x, weight, bias if biased else None, members=members, groups=min(groups, members)).double()
    product = x.to(torch.bfloat16).double() @ weight.to(torch.bfloat16).double().T + (bias.double() if biased else 0)
    gate, up = product.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    # Half a unit of bfloat16, and what float32 sums may be off where terms cancel out.
    size = (x.abs() @ weight.abs().T).double().chunk(2, dim=1)
    slack = 1e-6 * (size[0] * up.abs() + size[1] * gate.abs() + 1)
    assert ((ours - expected).abs() <= expected.abs() * 2.0**-8 * 1.01 + slack).all()


@pytest.mark.parametrize("members", [1, 2])
def test_a_rows_result_does_not_depend_on_the_others(members: int) -> None:
    x, weight, bias = numbers(530, 1)
    alone = torch.cat([gated(row[None], weight, bias, height=1) for row in x])
    for rows in (1, 2, 15, 16, 17, 33, 64, 70, 257, 530):
        for groups in range(1, members + 1):
            assert torch.equal(gated(x[:rows], weight, bias, members=members, groups=groups), alone[:rows])


def test_it_is_finite_where_gate_vanishes_and_up_is_huge() -> None:
    x = torch.full((1, HIDDEN), 1.0)
    weight = torch.zeros(2 * INTERMEDIATE, HIDDEN)
    weight[:INTERMEDIATE, 0], weight[INTERMEDIATE:, 0] = -1e20, 1e20
    assert torch.equal(gated(x, weight, None), torch.zeros(1, INTERMEDIATE, dtype=torch.bfloat16))
