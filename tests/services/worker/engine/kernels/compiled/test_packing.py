"""Packed weights give back what was packed: exactly, or within what their bits allow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from services.worker.engine.kernels.compiled.hadamard import transformed
from services.worker.engine.kernels.compiled.isa import Isa
from services.worker.engine.kernels.compiled.packing import (
    Arena,
    PackedLinear,
    aligned_zeros,
    pack,
    packed_bytes,
    padded_columns,
    unpack,
)
from services.worker.engine.kernels.compiled.tiles import GROUP

ISAS = (
    Isa("avx512", lanes=16, accumulators=24, vnni=True, byte_pairs=False, bfloat16_dots=False),
    Isa("avx2", lanes=8, accumulators=12, vnni=False, byte_pairs=True, bfloat16_dots=False),
    Isa("baseline", lanes=4, accumulators=12, vnni=False, byte_pairs=False, bfloat16_dots=False),
)
HALF_ROUNDING = 2.0**-11  # of a float16, relative
SMALLEST_HALF = 2.0**-24

isas = st.sampled_from(ISAS)
columns = st.integers(1, 150)
depths = st.integers(1, 100)
groups = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)


def packed(weight: Tensor, bits: int, isa: Isa) -> PackedLinear:
    """In an arena of just the right size."""
    arena = Arena(packed_bytes(*weight.shape, bits, isa))
    done = pack(weight, bits, isa, arena)
    with pytest.raises(ValueError, match="has no room for 64 after"):
        arena.copy(np.zeros(64, np.uint8))
    return done


def round_trip(weight: Tensor, bits: int, isa: Isa) -> Tensor:
    return unpack(packed(weight, bits, isa), *weight.shape)


def random_weight(columns: int, depth: int, seed: int) -> Tensor:
    """Of a scale of its own in each column."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-3, 3, (columns, 1), generator=generator)
    return torch.randn(columns, depth, generator=generator) * scales


def in_groups(weight: Tensor) -> Tensor:
    """[columns, groups, GROUP], padded with zeros as packing does."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


@given(isas, columns, depths, seeds)
def test_32_bits_keep_the_weights(isa: Isa, columns: int, depth: int, seed: int) -> None:
    weight = random_weight(columns, depth, seed)
    assert torch.equal(round_trip(weight, 32, isa), weight)


@given(isas, columns, depths, seeds)
def test_16_bits_are_bfloat16(isa: Isa, columns: int, depth: int, seed: int) -> None:
    weight = random_weight(columns, depth, seed)
    assert torch.equal(round_trip(weight, 16, isa), weight.to(torch.bfloat16).float())


@given(isas, columns, groups, seeds)
def test_8_bits_err_by_half_a_step_at_most_once_transformed(isa: Isa, columns: int, groups: int, seed: int) -> None:
    weight = random_weight(columns, groups * GROUP, seed)
    exact = transformed(weight)
    half_step = exact.abs().amax(-1, keepdim=True) / 127 / 2
    error = (transformed(round_trip(weight, 8, isa)) - exact).abs()
    assert (error <= half_step * 1.001).all()


def test_8_bits_take_whole_groups_of_k() -> None:
    with pytest.raises(ValueError, match=r"^40 is no multiple of 32$"):
        packed(torch.ones(3, 40), 8, ISAS[0])


@given(isas, columns, depths, seeds)
def test_4_bits_err_by_half_a_step_at_most(isa: Isa, columns: int, depth: int, seed: int) -> None:
    weight = random_weight(columns, depth, seed)
    least, most = in_groups(weight).amin(-1, keepdim=True), in_groups(weight).amax(-1, keepdim=True)
    span = most - least
    allowed = span / 15 / 2 + (span + least.abs() + most.abs()) * HALF_ROUNDING + 16 * SMALLEST_HALF
    error = (in_groups(round_trip(weight, 4, isa)) - in_groups(weight)).abs()
    assert (error <= allowed).all()


@given(isas, columns, groups, seeds)
def test_weights_of_a_q4_1_file_keep_their_values(isa: Isa, columns: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(columns, groups, 1, generator=generator) * 0.1 + 1e-4).half().float()
    least = (torch.randn(columns, groups, 1, generator=generator) * 0.5).half().float()
    numbers = torch.randint(0, 16, (columns, groups, GROUP), generator=generator)
    numbers[:, :, seed % GROUP], numbers[:, :, (seed + 1) % GROUP] = 0, 15
    weight = (numbers * step + least).flatten(1)
    assert torch.equal(round_trip(weight, 4, isa), weight)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 1e-9, 3000.0])
def test_groups_of_equal_weights_keep_them(value: float) -> None:
    """Their extremes are equal, so that there is no step to divide by."""
    weight = torch.full((3, 2 * GROUP), value)
    weight[0, GROUP:] = 0.5
    torch.testing.assert_close(round_trip(weight, 4, ISAS[0]), weight, rtol=HALF_ROUNDING, atol=127 * SMALLEST_HALF)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_what_is_missing_of_the_last_panel_is_zeros(bits: int) -> None:
    for isa in ISAS:
        wide = padded_columns(5, isa)
        depth, deep = (32, 32) if bits == 8 else (40, 64)  # of bytes: see the next test
        weights = unpack(packed(torch.ones(5, depth), bits, isa), wide, deep)
        assert weights.shape == (wide, deep)
        assert not weights[5:].any()
        assert not weights[:5, depth:].any()


def test_8_bits_are_the_same_whatever_threads_transform_them() -> None:
    weight = random_weight(300, 576, seed=1)
    before, first = torch.get_num_threads(), packed(weight, 8, ISAS[0])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            apart = torch.empty(300 * 576 + 1)[1:].view(300, 576).copy_(weight)  # not aligned as the first is
            again = packed(apart, 8, ISAS[0])
            assert np.array_equal(again.words, first.words)
            assert np.array_equal(again.scales, first.scales)
    finally:
        torch.set_num_threads(before)


def test_what_is_missing_of_the_last_run_of_bytes_stands_for_zeros() -> None:
    for isa in ISAS:
        words = packed(torch.randn(5, 96, generator=torch.Generator().manual_seed(1)), 8, isa).words
        assert words.shape[1] == 128 // 4
        assert (words[:, 96 // 4 :] == 0x80808080).all()


def test_an_arena_cuts_arrays_at_cache_lines() -> None:
    arena = Arena(1000)
    for size in (1, 64, 65, 3):
        array = arena.copy(np.full(size, 7, np.uint8))
        assert array.ctypes.data % 64 == 0
        assert (array == 7).all()
    with pytest.raises(ValueError, match="the arena of 1000 bytes has no room for 681 after 320"):
        arena.copy(np.zeros(681, np.uint8))
    assert len(arena.copy(np.zeros(680, np.uint8))) == 680


def test_arrays_in_an_arena_do_not_overlap() -> None:
    arena = Arena(4096)
    arrays = [arena.copy(np.full(size, size, np.uint16)) for size in (5, 100, 33)]
    assert [set(array.tolist()) for array in arrays] == [{5}, {100}, {33}]


def test_aligned_zeros() -> None:
    for shape in ((3, 5), (1,)):
        array = aligned_zeros(shape, np.float32)
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
        assert not array.any()
