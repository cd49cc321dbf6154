"""Attention tiles against the plain kernels: every slice of a mixed batch, over scattered blocks."""

import itertools
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.attention import attention_scratch_bytes, laid_bytes, make_attend
from services.worker.engine.kernels.compiled.attention_products import by_matrices, chunk_tokens
from services.worker.engine.kernels.compiled.frame import NO_WINDOW, tall_rows
from services.worker.engine.kernels.compiled.packing import aligned_zeros
from services.worker.engine.kernels.paged_kv import LayerShape, PagedKV
from services.worker.engine.kernels.plain import PlainKernels
from services.worker.engine.kernels.step_inputs import build_step_inputs
from tests.services.worker.engine.kernels.compiled.calling import ISA, compiled
from tests.services.worker.engine.tiny_models import make_sequence

BLOCKS, KV_HEADS = 256, 2
CPU = torch.device("cpu")
EPS = 1e-6
NUMBERS = itertools.count(1)
PHASES: WeakKeyDictionary[PagedKV, int] = WeakKeyDictionary()  # by pool, whose contents do not change meanwhile
CHUNK = chunk_tokens(16)
# (context with this step, tokens of this step): decodes, fresh prefills, ones that resume at, in and after a block, and
# the same around the end of a chunk
CASES = (
    (1, 1), (16, 1), (17, 1), (100, 1), (CHUNK, 1), (CHUNK + 1, 1), (2 * CHUNK + 35, 1),
    (7, 7), (40, 40), (48, 16), (50, 13), (90, 51), (300, 230), (65, 2), (CHUNK + 9, 30), (CHUNK + 50, 50),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """What the kernels are compiled for."""

    group: int
    head_dim: int
    kv_bits: int
    block_size: int = 16

    @property
    def shape(self) -> LayerShape:
        return LayerShape(KV_HEADS, self.head_dim, self.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.kv_bits == 32 else torch.bfloat16

    @property
    def tolerance(self) -> float:
        """Of outputs, whose values' standard deviation is 1; queries and weights may be rounded to bfloat16."""
        rounded = 0.02 if self.group <= 20 else 0.03  # of a million numbers some are farther off
        return rounded if ISA.activation_bits(self.kv_bits) == 16 else 3e-6


ALL_HEADS = (
    Heads(1, 32, 32), Heads(2, 64, 16), Heads(3, 128, 32), Heads(3, 64, 32), Heads(1, 128, 16), Heads(3, 48, 16),
    Heads(5, 64, 16, 32), Heads(2, 32, 16, 48), Heads(17, 32, 16), Heads(20, 64, 16, 64), Heads(40, 32, 16),
)  # fmt: skip


@cache
def laid_memory(heads: Heads) -> npt.NDArray[np.float32]:
    """What tiles find there that others have left."""
    laid = aligned_zeros((laid_bytes(ISA, heads.kv_bits, heads.head_dim, heads.block_size) // 4,), np.float32)
    laid[:] = np.nan
    return laid


def attend_tile(
    heads: Heads, piece: Slice, queries: Tensor, kv: PagedKV, window: int, head: int, first: int, height: int
) -> Tensor:
    """One tile's outputs [height, head_dim], of queries [tokens, heads, head_dim] that need no rotation."""
    kernel = compiled(
        make_attend, height, group=heads.group, head_dim=heads.head_dim, block_size=heads.block_size,
        kv_bits=heads.kv_bits, qk_norm=False, eps=EPS,
    )  # fmt: skip
    size = attention_scratch_bytes(ISA, height, heads.kv_bits, heads.head_dim, heads.block_size)
    scratch = aligned_zeros((-(-size // 4),), np.float32)
    scratch[:] = np.nan  # whatever was there before
    laid = laid_memory(heads)
    qkv = np.ascontiguousarray(queries[:, head * heads.group :].numpy())
    half = heads.head_dim // 2
    cos, sin = np.ones((piece.length, half), np.float32), np.zeros((piece.length, half), np.float32)
    layer, table = kv.layers[0], np.array(piece.sequence.blocks, np.int32)
    phase = PHASES.setdefault(kv, next(NUMBERS))
    kernel(
        phase, first, piece.length * heads.group, piece.start, window, qkv, qkv.strides[0], 0, cos, sin, table,
        layer.key[0, head].data_ptr(), layer.value[0, head].data_ptr(), kv.block_bytes, laid, scratch,
    )  # fmt: skip
    return torch.from_numpy(scratch[: height * heads.head_dim].reshape(height, -1))


def attend_slice(heads: Heads, piece: Slice, queries: Tensor, kv: PagedKV, window: int) -> Tensor:
    """As a step does: [tokens, heads, head_dim]."""
    height = heads.group if piece.length == 1 else tall_rows(ISA, heads.kv_bits, heads.head_dim)
    count, per_head = piece.length * heads.group, []
    for head in range(KV_HEADS):
        tiles = [
            attend_tile(heads, piece, queries, kv, window, head, first, height) for first in range(0, count, height)
        ]
        per_head.append(torch.cat(tiles)[:count].view(piece.length, heads.group, heads.head_dim))
    return torch.cat(per_head, dim=1)


def random_slices(heads: Heads) -> tuple[PagedKV, tuple[Slice, ...]]:
    """A pool in which nothing but the slices' contexts is finite."""
    kv = PagedKV([heads.shape], BLOCKS, heads.block_size, heads.dtype, CPU)
    kv.storage.fill_(torch.nan)
    blocks = torch.randperm(BLOCKS).tolist()
    slices = []
    for length, new in CASES:
        sequence = make_sequence([0] * length, [blocks.pop() for _ in range(-(-length // heads.block_size))])
        whole = build_step_inputs(Batch((Slice(sequence, 0, length),)), heads.block_size, CPU)
        keys, values = torch.randn(2, length, KV_HEADS, heads.head_dim).to(heads.dtype)
        PlainKernels().write_kv(keys * 2, values, kv.layers[0], whole)
        slices.append(Slice(sequence, length - new, new))
    return kv, tuple(slices)


@pytest.mark.parametrize("heads", ALL_HEADS, ids=str)
@pytest.mark.parametrize("window", [NO_WINDOW, CHUNK + 3, 33, 16, 5, 1])
def test_a_mixed_batch_attends_as_the_plain_kernels_do(heads: Heads, window: int) -> None:
    torch.manual_seed(0)
    kv, slices = random_slices(heads)
    queries = [torch.randn(piece.length, KV_HEADS * heads.group, heads.head_dim) for piece in slices]
    ours = [attend_slice(heads, piece, each, kv, window) for piece, each in zip(slices, queries, strict=True)]
    # In float64, so that the roundings of the plain kernels are not taken for ours.
    wide = PagedKV([heads.shape], BLOCKS, heads.block_size, torch.float64, CPU)
    wide.storage.copy_(kv.storage.nan_to_num())
    step = build_step_inputs(Batch(slices), heads.block_size, CPU)
    expected = PlainKernels().attend(
        torch.cat(queries).double(), wide.layers[0], step, scale=heads.head_dim**-0.5, window=min(window, 10_000)
    )
    torch.testing.assert_close(torch.cat(ours), expected.float(), rtol=1e-5, atol=heads.tolerance)


@pytest.mark.parametrize("heads", ALL_HEADS, ids=str)
@pytest.mark.parametrize("window", [NO_WINDOW, CHUNK + 3, 20])
def test_a_querys_result_does_not_depend_on_its_slice(heads: Heads, window: int) -> None:
    torch.manual_seed(1)
    kv, slices = random_slices(heads)
    for piece in slices[7:]:
        queries = torch.randn(piece.length, KV_HEADS * heads.group, heads.head_dim)
        together = attend_slice(heads, piece, queries, kv, window)
        for token in (0, 1, piece.length // 2, piece.length - 1):
            alone = Slice(piece.sequence, piece.start + token, 1)
            assert torch.equal(attend_slice(heads, alone, queries[token : token + 1], kv, window)[0], together[token])


@pytest.mark.parametrize("heads", ALL_HEADS, ids=str)
def test_what_was_laid_out_serves_until_the_phase_ends(heads: Heads) -> None:
    torch.manual_seed(2)
    kv, slices = random_slices(heads)
    piece = slices[6]
    queries = torch.randn(1, KV_HEADS * heads.group, heads.head_dim)

    def attend() -> Tensor:
        return attend_tile(heads, piece, queries, kv, NO_WINDOW, 0, 0, heads.group)[: heads.group]

    before = attend()
    kv.storage.mul_(-0.5)  # as no step does within a phase
    assert torch.equal(attend(), before) == by_matrices(ISA, heads.kv_bits, heads.head_dim)
    PHASES[kv] = next(NUMBERS)
    assert not torch.equal(attend(), before)
